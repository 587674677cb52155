"""What the `config.json` inside a saved model may say: exactly the layers that our models use, with plain parameters.

Keras builds whatever a config names, by importing it: `safe_mode` refuses marshalled lambdas alone (CVE-2024-3660), not
other modules' functions (CVE-2025-1550), not Keras's own that touch files, the network or `safe_mode` itself
(CVE-2025-8747, CVE-2025-9906), and TFOpLambda reaches any symbol of TensorFlow. So nothing is trusted that is not
spelled out here: no word outside these lists, no key that is not known, no number out of bounds. The first thing wrong
ends the look, so that a small file can't fill the memory with errors about it.
"""

import json
import reprlib
from graphlib import CycleError, TopologicalSorter
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

CALLS = 5_000  # of layers; eight views of InceptionV3 are 2,500
MARKS = 200_000  # quotes and opening brackets, which cost memory far beyond their byte; those have 42,000
SIDE = 1024  # pixels; a flip, which is a layer with a matrix, has so many numbers a side

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]
Float = Annotated[float, Field(allow_inf_nan=False)]
Size = Annotated[int, Field(ge=1, le=2**16)]  # units, filters, pixels
Step = Annotated[int, Field(ge=1, le=64)]  # of kernels, strides, pools
Axis = Annotated[int, Field(ge=-4, le=4)]


def several(item: object, most: int, least: int = 0) -> object:
    """The type of a list of `least` to `most` items."""
    return Annotated[list[item], Field(min_length=least, max_length=most, fail_fast=True)]


Shape = several(Size | None, 4, 2)
Pair = several(Step, 2, 2)
Margin = several(Annotated[int, Field(ge=0, le=64)], 2, 2)
Words = Literal["linear", "relu", "sigmoid"]
Padding = Literal["same", "valid"]


class Exact(BaseModel):
    """No key more, none less, nothing converted."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def known(cls, values: object) -> object:
        if isinstance(values, dict) and len(values) > len(cls.model_fields):  # else each key more were an error
            raise ValueError(f"expected {len(cls.model_fields)} keys, not {len(values):,}")
        return values


Vector = several(Float, SIDE)
Matrix = several(Vector, SIDE)
Numbers = Float | Vector | Matrix | several(several(Matrix, 64), 64)


class Values(Exact):
    value: Numbers
    dtype: Literal["float32", "float64"]


class Array(Exact):
    class_name: Literal["__numpy__"]
    config: Values


class Start(Exact):
    """What a weight is before the file's numbers take its place."""

    value: Numbers | Array = 0.0
    seed: int | None = None


class Initializer(Exact):
    module: Literal["keras.initializers"]
    class_name: Literal["Constant", "GlorotUniform", "Ones", "Zeros"]
    config: Start
    registered_name: None


class InputLayer(Exact):
    name: Name
    batch_input_shape: several(Annotated[int, Field(ge=1, le=SIDE)] | None, 4, 2)
    dtype: Literal["float32"]
    sparse: Literal[False]
    ragged: Literal[False]

    def numbers(self, shape: list[int | None]) -> int:
        """How many weights the layer has on inputs of `shape`."""
        return 0


class Layer(Exact):
    name: Name
    trainable: bool
    dtype: Literal["float32"]

    def numbers(self, shape: list[int | None]) -> int:
        """How many weights the layer has on inputs of `shape`."""
        return 0


class Channels(Layer):
    data_format: Literal["channels_last"]


class Convolution(Channels):
    kernel_size: Pair
    strides: Pair
    padding: Padding
    dilation_rate: Pair
    groups: Literal[1]
    activation: Words
    use_bias: bool
    bias_initializer: Initializer
    bias_regularizer: None
    activity_regularizer: None
    bias_constraint: None


class Conv2D(Convolution):
    filters: Size
    kernel_initializer: Initializer
    kernel_regularizer: None
    kernel_constraint: None

    def numbers(self, shape):
        height, width = self.kernel_size
        return (height * width * shape[-1] + self.use_bias) * self.filters


class DepthwiseConv2D(Convolution):
    depth_multiplier: Step
    depthwise_initializer: Initializer
    depthwise_regularizer: None
    depthwise_constraint: None

    def numbers(self, shape):
        height, width = self.kernel_size
        return (height * width + self.use_bias) * shape[-1] * self.depth_multiplier


class Dense(Layer):
    units: Size
    activation: Words
    use_bias: bool
    kernel_initializer: Initializer
    bias_initializer: Initializer
    kernel_regularizer: None
    bias_regularizer: None
    activity_regularizer: None
    kernel_constraint: None
    bias_constraint: None

    def numbers(self, shape):
        return (shape[-1] + self.use_bias) * self.units


class BatchNormalization(Layer):
    axis: several(Axis, 1, 1)
    momentum: Float
    epsilon: Float
    center: bool
    scale: bool
    beta_initializer: Initializer
    gamma_initializer: Initializer
    moving_mean_initializer: Initializer
    moving_variance_initializer: Initializer
    beta_regularizer: None
    gamma_regularizer: None
    beta_constraint: None
    gamma_constraint: None

    def numbers(self, shape):
        return (2 + self.center + self.scale) * shape[self.axis[0]]


class Rescaling(Layer):
    scale: Float
    offset: Float


class Activation(Layer):
    activation: Words


class ReLU(Layer):
    max_value: Float | None
    negative_slope: Float
    threshold: Float


class LeakyReLU(Layer):
    alpha: Float


class Pooling(Channels):
    pool_size: Pair
    strides: Pair
    padding: Padding


class MaxPooling2D(Pooling):
    pass


class AveragePooling2D(Pooling):
    pass


class GlobalAveragePooling2D(Channels):
    keepdims: bool


class ZeroPadding2D(Channels):
    padding: several(Margin, 2, 2)


class Permute(Layer):
    dims: several(Step, 3)


class UnitNormalization(Layer):
    axis: several(Axis, 3)


class Concatenate(Layer):
    axis: Axis


class Add(Layer):
    pass


class Average(Layer):
    pass


LAYERS = {
    layer.__name__: layer
    for layer in (
        Activation, Add, Average, AveragePooling2D, BatchNormalization, Concatenate, Conv2D, Dense, DepthwiseConv2D,
        GlobalAveragePooling2D, InputLayer, LeakyReLU, MaxPooling2D, Permute, ReLU, Rescaling, UnitNormalization,
        ZeroPadding2D,
    )
}  # fmt: skip

Call = Annotated[int, Field(ge=0, le=CALLS)]
# Layer, which of its calls, which output, and what else it is called with: lists in JSON.
Tensor = Annotated[tuple[Name, Call, Literal[0]], Field(strict=False)]
Argument = Annotated[tuple[Name, Call, Literal[0], Annotated[dict, Field(max_length=0)]], Field(strict=False)]


class Built(Exact):
    input_shape: Shape | several(Shape, 100)


class Entry(Exact):
    """A layer and where its inputs come from, one list of arguments a call."""

    module: Literal["keras.layers"]
    class_name: Literal[tuple(LAYERS)]
    config: dict
    registered_name: None
    build_config: Built | None = None
    name: Name
    inbound_nodes: several(several(Argument, 100), CALLS)


class Graph(Exact):
    name: Name
    trainable: bool
    layers: several(Entry, CALLS)
    input_layers: several(Tensor, 1, 1)
    output_layers: several(Tensor, 1, 1)


class Model(Exact):
    module: Literal["keras.src.engine.functional"]
    class_name: Literal["Functional"]
    config: Graph
    registered_name: Literal["Functional"]
    build_config: Built


def check_config(config: bytes) -> int:
    """How many weights the model in `config` has; follows from its words alone, before anything is built.

    Raises:
        ValueError: `config` (what `config.json` holds) is not a model made of the layers above.
    """
    if (marks := sum(map(config.count, (b'"', b"[", b"{")))) > MARKS:
        raise ValueError(f"config.json has {marks:,} quotes and brackets (at most {MARKS:,})")
    try:
        graph = Model.model_validate(json.loads(config)).config
        numbers = 0
        for entry in graph.layers:
            layer = LAYERS[entry.class_name].model_validate(entry.config)
            if layer.name != entry.name:
                raise ValueError(f"layer {entry.name} is called {layer.name} too")
            try:
                numbers += layer.numbers(entry.build_config and entry.build_config.input_shape)
            except (TypeError, IndexError):
                raise ValueError(f"layer {entry.name}: the shape of its inputs is unknown") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or error.title
        raise ValueError(f"{place[:100]}: {first['msg']}, not {reprlib.repr(first['input'])[:60]}") from None
    _check_calls(graph)
    return numbers


def _check_calls(graph: Graph) -> None:
    """Keras calls a layer when all its inputs are there; a circle would keep it waiting for ever."""
    calls = {}  # (layer, number of the call): what must have happened before
    for entry in graph.layers:
        if (entry.name, 0) in calls:
            raise ValueError(f"two layers are called {entry.name}")
        calls[entry.name, 0] = []
        for number, arguments in enumerate(entry.inbound_nodes):
            former = [(entry.name, number - 1)] if number else []
            calls[entry.name, number] = former + [(name, call) for name, call, *_ in arguments]
    if len(calls) > CALLS:
        raise ValueError(f"{len(calls):,} calls of layers (at most {CALLS:,})")
    ends = [(name, call) for name, call, _ in graph.input_layers + graph.output_layers]
    for name, call in [end for before in calls.values() for end in before] + ends:
        if (name, call) not in calls:
            raise ValueError(f"there is no call {call} of a layer {name}")
    try:
        TopologicalSorter(calls).prepare()
    except CycleError:
        raise ValueError("its layers wait for each other in a circle") from None
