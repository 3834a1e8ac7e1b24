"""bfloat16 on a processor without instructions for it."""

from __future__ import annotations

import pytest

from collm.settings.load import parse_config
from collm.training import assemble


@pytest.mark.parametrize(
    ("able", "compute", "warned"), [(False, "bfloat16", True), (True, "bfloat16", False), (False, "float32", False)]
)
def test_a_slow_number_format_is_named_with_the_way_out(monkeypatch, capsys, able, compute, warned):
    monkeypatch.setattr(assemble, "multiplies_bfloat16", lambda: able)
    config = parse_config(
        {"env": {"name": "agree", "wording": "terse"}, "run": {"device": "cpu"}, "team": {"compute": compute}}
    )
    assemble.make_team(config, ("agent_0", "agent_1"))
    assert ("Set team.compute='float32'" in capsys.readouterr().err) == warned
