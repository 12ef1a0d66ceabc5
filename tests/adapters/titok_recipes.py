"""recipes.json of TiTok."""

from adapters import Case, Check, UnknownCase


def run_recipes(case: Case) -> list[Check]:
    raise UnknownCase("todo")
