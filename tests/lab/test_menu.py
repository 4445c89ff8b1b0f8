"""The names that help shows without jax are those of the tables, which need it."""

import pytest

from forwax.lab import data
from forwax.lab.catalogue import (
    columns,
    experiments,
    menu,
    names,
    optimizers,
    rules,
    settings,
)


def published(name):
    return rules.RULES[name].published


@pytest.mark.parametrize(
    ("shown", "table"),
    [
        (menu.EXPERIMENTS, experiments.EXPERIMENTS),
        (menu.COLUMNS, columns.COLUMNS),
        (menu.LINES, names.LINES),
        (menu.RULES, [name for name in rules.RULES if not published(name)]),
        (menu.METHODS, filter(published, columns.RULES)),
        (sorted(menu.NAMES["rule"]), sorted(rules.RULES)),
        (menu.NAMES["tangents"], sorted(rules.TANGENTS)),
        (menu.NAMES["combine"], sorted(rules.COMBINES)),
        (menu.NAMES["optimizer"], sorted(optimizers.OPTIMIZERS)),
        (menu.NAMES["schedule"], sorted(optimizers.SCHEDULES)),
        (menu.NAMES["size"], sorted(columns.SIZES)),
        (menu.NAMES["data"], sorted(data.names())),
    ],
)
def test_a_list_has_the_names_of_its_table(shown, table):
    assert [*shown] == [*table]


def test_facts_of_the_tables():
    mixers = [name for name, each in experiments.EXPERIMENTS.items() if each.is_mixer]
    assert mixers == [menu.MIXER]
    alone = {name for name in menu.RULES if not rules.RULES[name].needs_data}
    assert {*menu.WITHOUT_DATA} == alone - {"backprop"}
    assert {*menu.NAMES} < {*settings.Settings().as_dict()}
    for name in (*menu.DEFAULT_LINES, *menu.PAPER_LINES):
        assert names.parse(name)
