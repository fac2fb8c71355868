"""The table of quantised formats. A new format is a row."""

from merit_fast.merge.read.quantised.scheme import COMPRESSED_TENSORS, FP8_METHODS
from merit_fast.records import record

_FLOATS = ("F32", "BF16", "F16", "F64")
_E8M0 = ("F8_E8M0", "U8")
_FP8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
# After the weight's name; after its module's, which the name ends in ".weight".
_FP8_SCALES = ("{}_scale_inv", "{}_scale", "{module}.scale_inv", "{module}.scale") + (
    "{module}.qscale_weight",
)


@record
class Format:
    """One form of a quantised tensor in a file.

    Attributes:
        name: in messages and docs.
        found_in: models or writers that use it.
        codes: the stored codes' name; {} stands for the tensor's.
        stored: dtypes of the stored codes.
        code: their kind in CODES; "": the stored dtype; "INT": integers of the config's width.
        scales: names that the scale may have; {module} stands for the name without ".weight".
        scale_dtypes: dtypes of the scale. 8-bit integers are E8M0.
        block: rows and columns of a block with one scale. None: from shapes and config.
        second: name of a second scale, of one number or one per expert.
        divides: whether values are divided by the second scale.
        zero: name of zero points, which need not be there.
        order: name of the column groups' order, which need not be there.
        shape: name of the tensor that holds the weight's shape.
        is_transposed: whether the tensor is the decoded one with its last two dimensions swapped.
        methods: quant_method that this form needs; (): any or none.
        writes: whether a merge without ``dtype`` writes this form with fresh scales.
    """

    name: str
    found_in: str
    codes: str
    stored: tuple[str, ...]
    code: str
    scales: tuple[str, ...]
    scale_dtypes: tuple[str, ...]
    block: tuple[int, int] | None = None
    second: str = ""
    divides: bool = False
    zero: str = ""
    order: str = ""
    shape: str = ""
    is_transposed: bool = False
    methods: tuple[str, ...] = ()
    writes: bool = False


FORMATS = (
    Format(
        "fp8",
        "DeepSeek-V3, Qwen3-FP8, Mistral, FBGEMM, ModelOpt, compressed-tensors float-quantized",
        "{}",
        _FP8,
        "",
        _FP8_SCALES,
        _FLOATS,
        writes=True,
    ),
    Format(
        "fp8, E8M0 scales",
        "DeepSeek-V3.1 and V4, MXFP8, compressed-tensors mxfp8-quantized",
        "{}",
        _FP8,
        "",
        _FP8_SCALES,
        _E8M0,
        writes=True,
    ),
    Format(
        "nvfp4, ModelOpt",
        "ModelOpt NVFP4",
        "{}",
        ("U8",),
        "F4",
        ("{}_scale",),
        ("F8_E4M3",),
        (1, 16),
        second="{}_scale_2",
    ),
    Format(
        "nvfp4-pack-quantized",
        "compressed-tensors",
        "{}_packed",
        ("U8",),
        "F4",
        ("{}_scale",),
        ("F8_E4M3",),
        (1, 16),
        second="{}_global_scale",
        divides=True,
    ),
    Format(
        "mxfp4-pack-quantized",
        "compressed-tensors",
        "{}_packed",
        ("U8",),
        "F4",
        ("{}_scale",),
        _E8M0,
        (1, 32),
    ),
    Format(
        "mxfp6-pack-quantized",
        "compressed-tensors",
        "{}_packed",
        ("U8",),
        "F6_E2M3",
        ("{}_scale",),
        _E8M0,
        (1, 32),
    ),
    Format(
        "mxfp4, blocks",
        "gpt-oss",
        "{}_blocks",
        ("U8",),
        "F4",
        ("{}_scales",),
        _E8M0,
        (1, 32),
        is_transposed=True,
    ),
    Format(
        "fp4 experts",
        "DeepSeek-V4",
        "{}",
        ("I8",),
        "F4",
        _FP8_SCALES,
        (*_E8M0, "F32"),
        (1, 32),
        methods=FP8_METHODS,
    ),
    Format(
        "int-quantized",
        "compressed-tensors, 8 bits",
        "{}",
        ("I8",),
        "I8",
        ("{}_scale",),
        _FLOATS,
        zero="{}_zero_point",
        methods=(COMPRESSED_TENSORS,),
    ),
    Format(
        "pack-quantized",
        "compressed-tensors, 1 to 8 bits",
        "{}_packed",
        ("I32",),
        "INT",
        ("{}_scale",),
        _FLOATS,
        zero="{}_zero_point",
        order="{}_g_idx",
        shape="{}_shape",
        methods=(COMPRESSED_TENSORS,),
    ),
)
# Scales of a layer's inputs, outputs and cache: weights do not need them.
LAYER_SCALES = (
    "input_scale",
    "output_scale",
    "activation_scale",
    "input_global_scale",
    "input_zero_point",
    "output_zero_point",
    "qscale_act",
    "k_scale",
    "v_scale",
    "q_scale",
    "kv_scale",
    "prob_scale",
)


def formats_markdown() -> str:
    """The table of formats for the docs, one row for each."""
    lines = [
        "| format | found in | stored codes | scales | block | read by | exact to | written |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for form in FORMATS:
        block = " x ".join(map(str, form.block)) if form.block else "any"
        scales = [*form.scales, *filter(None, (form.second, form.zero, form.order, form.shape))]
        names = ", ".join(f"`{name.replace('{module}', 'M').format('X')}`" for name in scales)
        codes = f"`{form.codes.format('X')}` {' or '.join(form.stored)}"
        exact = "one division in float64" if form.divides else "code x scale in float64"
        written = "with fresh scales" if form.writes else "where nothing changes it"
        cells = (form.name, form.found_in, codes, names, block, "every method", exact, written)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
