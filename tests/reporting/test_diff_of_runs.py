"""``gmt-tune diff`` of a model and what a recipe's run made of it."""

import json

import pytest
from safetensors.torch import load_file

from gmt_tune.cli.main import main


def as_json(capsys, *arguments) -> dict:
    assert main(["diff", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_with_sgd_changed_its_density_and_left_what_was_frozen(smollm2_shaped, smollm2_run, capsys):
    """One selection of density 0.2 and plain SGD: exactly those entries moved, whatever the number of steps."""
    found = as_json(capsys, smollm2_shaped, smollm2_run / "epoch_0")
    masked = {n: c for n, c in found["tensors"].items() if "_proj" in n}
    assert len(masked) == 30 * 7
    for name, change in masked.items():
        # floor(0.2 n) entries and ties with the last of them; an entry whose updates round away did not move
        assert change["changed"] / change["entries"] == pytest.approx(0.2, abs=0.003), name
    for module in ("self_attn.q_proj", "mlp.down_proj"):
        assert found["by_module"][module]["fraction_changed"] == pytest.approx(0.2, abs=0.002)
    frozen = {n: c for n, c in found["tensors"].items() if "embed_tokens" in n}
    assert len(frozen) == 1 and all(change["changed"] == 0 for change in frozen.values())
    dense = [c["fraction_changed"] for n, c in found["tensors"].items() if "norm" in n]
    assert min(dense) > 0.9


def test_a_checkpoint_does_not_differ_from_itself(smollm2_shaped, capsys):
    found = as_json(capsys, smollm2_shaped, smollm2_shaped)
    assert found["total"]["changed"] == 0 and found["total"]["relative_change"] == 0
    assert main(["diff", str(smollm2_shaped), str(smollm2_shaped)]) == 0
    assert "moved most" not in capsys.readouterr().out


def test_an_output_folder_in_place_of_its_checkpoint_is_recognised(smollm2_shaped, smollm2_run, capsys):
    assert main(["diff", str(smollm2_shaped), str(smollm2_run)]) == 1
    message = capsys.readouterr().err
    assert f"did you mean {smollm2_run / 'epoch_0'}?" in message


def test_loading_by_safetensors_agrees(smollm2_shaped, smollm2_run, capsys):
    """One tensor, by the library itself."""
    name = "model.layers.29.mlp.down_proj.weight"
    before = load_file(smollm2_shaped / "model.safetensors")[name]
    files = list((smollm2_run / "epoch_0").glob("*.safetensors"))
    after = next(tensors[name] for tensors in map(load_file, files) if name in tensors)
    found = as_json(capsys, smollm2_shaped, smollm2_run / "epoch_0")["tensors"][name]
    assert found["changed"] == int((before != after).sum())
