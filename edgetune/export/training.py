"""From a graph with a loss to what ONNX Runtime trains from: training, eval and optimizer graphs and a checkpoint.

What is put right here of what the generator writes: see `docs/decisions/0010-onnxruntime.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from edgetune.artifacts.manifest import OptimizerFiles, Schedule
from edgetune.backends.ort_runtime import artifacts_api
from edgetune.errors import UnsupportedModel
from edgetune.export.graphs import IR_VERSION, OPSET
from edgetune.optim import OptimizerSettings

TRAINING, EVAL, CHECKPOINT = "training_model.onnx", "eval_model.onnx", "checkpoint"
# The rate that runtimes without a setter feed.
FIXED_RATE = 0.001


def write_training(graph: onnx.ModelProto, folder: Path, trained: Sequence[str]) -> None:
    """training_model.onnx, eval_model.onnx and checkpoint in `folder`: `trained` get gradients, nothing else does.

    Raises: UnsupportedModel naming the operator whose gradient can't be built.
    """
    artifacts, _ = artifacts_api()
    wanted = set(trained)
    names = [tensor.name for tensor in graph.graph.initializer]
    outputs = [output.name for output in graph.graph.output]
    try:
        artifacts.generate_artifacts(
            graph,
            requires_grad=[name for name in names if name in wanted],
            frozen_params=[name for name in names if name not in wanted],
            loss=None,
            optimizer=None,
            artifact_directory=str(folder),
            additional_output_names=outputs[1:],
            loss_input_names=outputs[:1],
        )
    except Exception as error:
        raise UnsupportedModel(
            f"no gradient graph can be built: {_what(error)}. Train it with torch "
            "(--backend torch), or try a plain vit_* or deit_* model."
        ) from error
    for name in (TRAINING, EVAL):
        written = onnx.load(str(folder / name))
        written.ir_version = min(written.ir_version, IR_VERSION)
        onnx.save(written, str(folder / name))


def _what(error: Exception) -> str:
    """The runtime's own words at the end of its message, which begins with files and signatures of its source."""
    line = " ".join(str(error).split())
    return line.rsplit("> >) ", 1)[-1].rsplit("was false. ", 1)[-1][-300:]


def write_optimizers(folder: Path, settings: OptimizerSettings, schedule: Schedule) -> dict[str, OptimizerFiles]:
    """AdamW's and SGD's update as graphs, which serve every variant: the parameters come as a sequence.

    `plain` takes the rate that the runtime sets; `scheduled` has the schedule in it.
    """
    _, onnxblock = artifacts_api()
    blocks = {
        "adamw": onnxblock.optim.AdamW(
            betas=(settings.beta1, settings.beta2), eps=settings.epsilon, weight_decay=settings.weight_decay
        ),
        "sgd": onnxblock.optim.SGD(),
    }
    some_parameter = helper.make_tensor("", TensorProto.FLOAT, [1], [0.0])  # of which the block reads the type
    files: dict[str, OptimizerFiles] = {}
    for name, block in blocks.items():
        with onnxblock.empty_base(opset_version=OPSET):
            block(([some_parameter], []))
            model: onnx.ModelProto = block.to_model_proto()
        _put_right(model)
        files[name] = OptimizerFiles(plain=f"optimizer_{name}.onnx", scheduled=f"optimizer_{name}_scheduled.onnx")
        onnx.save(model, str(folder / files[name].plain))
        bake(model, schedule)
        onnx.save(model, str(folder / files[name].scheduled))
    return files


def _put_right(model: onnx.ModelProto) -> None:
    model.ir_version = IR_VERSION
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "AdamWOptimizer" and attribute.name == "adam_mode":
                attribute.i = 0  # torch's formula
    # What is declared {1} is inferred {}: a warning in Python, a bare number as the error of wasm.
    for output in model.graph.output:
        if output.type.HasField("tensor_type"):
            output.type.tensor_type.ClearField("shape")


def bake(model: onnx.ModelProto, schedule: Schedule) -> None:
    """Make an optimizer graph follow the schedule whatever rate it is fed, provided that is FIXED_RATE.

    The rate of step s (from 1): `peak * s / warmup` up to `warmup`, then a cosine to zero at `total`. A runtime that
    goes on with a training counts its steps from 1 again: `schedule_begun`, 0 here, is how many were done before.
    """
    graph = model.graph
    rate, baked = "learning_rate", "scheduled_rate"
    for each in graph.node:
        each.input[:] = [baked if name == rate else name for name in each.input]
    constants = {
        "one": 1.0,
        "half": 0.5,
        "pi": 3.141592653589793,
        "scale": schedule.peak_rate / FIXED_RATE,
        "warmup": float(schedule.warmup_steps),
        "ramp": float(max(1, schedule.warmup_steps)),
        "rest": float(max(1, schedule.total_steps - schedule.warmup_steps)),
        "zero": 0.0,
        "begun": 0.0,
    }
    for name, value in constants.items():
        graph.initializer.append(helper.make_tensor(f"schedule_{name}", TensorProto.FLOAT, [], [value]))

    def node(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> Any:
        return helper.make_node(kind, list(inputs), [output], name=f"schedule/{output}", **attributes)

    nodes = [
        node("Cast", ["step"], "own_step", to=TensorProto.FLOAT),  # from 1
        node("Add", ["own_step", "schedule_begun"], "step_float"),
        node("Sub", ["step_float", "schedule_one"], "done"),
        node("Div", ["step_float", "schedule_ramp"], "rising"),
        node("Sub", ["done", "schedule_warmup"], "past_warmup"),
        node("Div", ["past_warmup", "schedule_rest"], "share"),
        node("Max", ["share", "schedule_zero"], "share_low"),
        node("Min", ["share_low", "schedule_one"], "share_clipped"),
        node("Mul", ["share_clipped", "schedule_pi"], "angle"),
        node("Cos", ["angle"], "cosine"),
        node("Add", ["cosine", "schedule_one"], "raised"),
        node("Mul", ["raised", "schedule_half"], "falling"),
        node("Less", ["done", "schedule_warmup"], "is_warmup"),
        node("Where", ["is_warmup", "rising", "falling"], "factor"),
        node("Mul", ["factor", "schedule_scale"], "scaled"),
        node("Mul", [rate, "scaled"], baked),
    ]
    for place, made in enumerate(nodes):
        graph.node.insert(place, made)
