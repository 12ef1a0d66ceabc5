import csv

from vgen.training.csv_log import CsvLogger


def rows(logger: CsvLogger) -> list[dict]:
    with logger.path.open() as file:
        return list(csv.DictReader(file))


def test_new_columns_do_not_lose_old_rows(tmp_path):
    logger = CsvLogger(tmp_path)
    logger.start(0)
    logger.log_metrics({"loss": 2.0}, step=1)
    logger.log_metrics({"val": 3.0}, step=1)
    assert rows(logger) == [{"step": "1", "loss": "2.0", "val": ""}, {"step": "1", "loss": "", "val": "3.0"}]


def test_resume_keeps_rows_up_to_its_step_only(tmp_path):
    first = CsvLogger(tmp_path)
    first.start(0)
    for step in (1, 2, 3):
        first.log_metrics({"loss": float(step)}, step=step)
    second = CsvLogger(tmp_path)
    second.start(2)
    second.log_metrics({"loss": 30.0}, step=3)
    assert [row["loss"] for row in rows(second)] == ["1.0", "2.0", "30.0"]


def test_a_fresh_start_replaces_the_file(tmp_path):
    first = CsvLogger(tmp_path)
    first.start(0)
    first.log_metrics({"loss": 1.0}, step=1)
    second = CsvLogger(tmp_path)
    second.start(0)
    assert rows(second) == []
