"""From a language model to a plan of its heads and back, by the commands that the README names."""

import numpy as np
import pytest
from flax import nnx

from examples.language_model import data, score_table, write_profiles
from examples.language_model.model import Config, LanguageModel, save
from jsparse.cli import main
from jsparse.planning import load_table

SMALL = Config(width=32, layers=2, heads=2, kv_heads=1, hidden=32)


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, arguments)])
    module.main()


@pytest.mark.slow
def test_a_model_is_profiled_planned_and_scored(tmp_path, monkeypatch, capsys):
    text = np.frombuffer(bytes(range(32, 96)) * 40, np.uint8)
    monkeypatch.setattr(data, "split", lambda: (text, text[::-1]))
    checkpoint, folder = tmp_path / "model.safetensors", tmp_path / "profile"
    save(LanguageModel(SMALL, rngs=nnx.Rngs(0)), checkpoint)
    model = ["--checkpoint", checkpoint]
    sizes = ["--lengths", 256, "--held-out", 320, "--texts", 1]
    run(write_profiles, monkeypatch, *model, "--output", folder, *sizes)
    assert {p.name for p in folder.iterdir()} == {"256-0.safetensors", "320-0.safetensors"}
    # the command it prints, told what fits such short texts
    command = capsys.readouterr().out.splitlines()[-1].split()
    assert command[:4] == ["jsparse", "plan", "--method", "moa"]
    table = tmp_path / "plan.json"
    main([*command[1:], "--interval", "64", "--density", "0.6", "--output", str(table)])
    assert f"plan: {table}" in capsys.readouterr().out
    share = score_table.kept_share(load_table(table), 256)
    assert 0.54 <= share <= 0.6
    run(score_table, monkeypatch, table, *model, "--context", 256, "--texts", 1)
    lines = capsys.readouterr().out.splitlines()[1:]
    names = ["dense", "moa, a setting for each head", f"moa, {share:.3f} of the length for all"]
    assert [line[10:] for line in lines] == names
    # what is left out makes a difference, in each in its own way
    assert len({line[:8] for line in lines}) == 3
    # what is there is not made again
    run(write_profiles, monkeypatch, *model, "--output", folder, *sizes)
    assert len(capsys.readouterr().out.splitlines()) == 2
