import torch

from benchmarks import evaluation, frechet_distance


def test_a_small_fid_job(capsys):
    values = evaluation.main(["--images", "5", "--batch", "2", "--device", "cpu", "--stored", "3", "--size", "24"])
    assert 0 < values["device_share"] <= 1
    out = capsys.readouterr().out
    assert "images/s, device-bound share" in out


def test_methods_of_the_distance_agree(capsys):
    values = frechet_distance.main(["--dim", "24", "--samples", "300"])
    reference = torch.tensor(values.pop("vgen"))
    for value in values.values():
        torch.testing.assert_close(torch.tensor(value), reference, rtol=1e-5, atol=1e-5)
    assert "scipy sqrtm" in capsys.readouterr().out
