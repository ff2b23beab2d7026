"""Programs: the denoiser by torch.export and in onnxruntime, for any batch and size."""

import json

import pytest
import torch

from exports import CLASSES, EXPERTS, MASKDIT, UNET, trained, variant
from shoestring.export import program
from shoestring.export.program import Inputs, check_program, export_onnx, export_torch, inputs_of
from shoestring.runtime import UserError


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        variant(
            EXPERTS | {"depth": 2, "mixer": {"depth": 2, "dim": 16}, "head_dim": 8}, process={"kind": "flow"}
        ),
        variant(MASKDIT | CLASSES | {"depth": 1}, tokens={"method": "maskdit"}),
        variant({"depth": 1, "guidance_input": True}, process={"kind": "ddpm", "prediction": "v"}),
        variant(UNET | {"condition": "none"}),
    ],
    ids=["experts-flow", "maskdit-class", "text-ddpm-distilled", "unet"],
)
def test_onnx_does_what_the_network_does_at_other_sizes(config, tmp_path):
    """At sizes other than those of tracing and of the exporter's own three."""
    import onnxruntime

    source = trained(tmp_path / "run", config)
    said = export_onnx(source, tmp_path / "out")
    assert "in onnxruntime at three sizes" in said
    session = onnxruntime.InferenceSession(
        tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    mark = json.loads((tmp_path / "out" / "shoestring.json").read_text())
    assert {each.name for each in session.get_inputs()} == mark["inputs"].keys()
    assert mark["inputs"]["xt"]["shape"] == ["batch", 3, "height", "width"]
    for batch, rows, columns in ((1, 6, 2), (4, 2, 7), (5, 8, 8)):
        inputs = inputs_of(source, batch, rows, columns)
        reference = program.expected(source, inputs)
        made = session.run(None, {name: value.numpy() for name, value in inputs.values.items()})[0]
        assert (torch.from_numpy(made) - reference).abs().max() <= 1e-4 * reference.abs().max()
        assert reference.std() > 0.05


@pytest.mark.slow
def test_torch_export_is_read_without_our_code(tmp_path):
    source = trained(tmp_path / "run", variant({"depth": 1}))
    export_torch(source, tmp_path / "out")
    made = torch.export.load(tmp_path / "out" / "model.pt2").module()
    inputs = inputs_of(source, 3, 5, 2)
    with torch.no_grad():
        torch.testing.assert_close(
            made(**inputs.values), program.expected(source, inputs), rtol=1e-4, atol=1e-5
        )


def test_a_program_that_differs_is_not_written(tmp_path):
    source = trained(tmp_path / "run", variant())

    def worse(inputs: Inputs) -> torch.Tensor:
        made = program.expected(source, inputs)
        return made + 3e-4 * made.abs().max() * (len(made) == 3)  # at the last of the three sizes

    with pytest.raises(
        UserError, match=r"the ONNX program differs from the network by 3\.0e-04 .* nothing was"
    ):
        check_program(source, worse, "ONNX")
    assert check_program(source, lambda inputs: program.expected(source, inputs), "ONNX") == 0
