"""NV001 to NV010: files, shards and the index.

One defect, one rule. A shard that cannot be used is NV001, NV002 or NV008, and what it holds is
nobody else's business; a name that the index gets wrong is NV003, and no other rule calls it
missing; the tensors of a file that the index does not name are covered by NV006.
"""

from collections import Counter
from collections.abc import Iterator

from nvfp4check.checkpoint.index import INDEX_FILE
from nvfp4check.checkpoint.rules.base import Problem, Rule, RuleContext, counted, printable, rule
from nvfp4check.checkpoint.rules.shared import SINGLE_SHARD, stray_shards
from nvfp4check.findings import Severity


@rule(
    "NV001",
    "shard-unreadable",
    Severity.ERROR,
    fires_when="a shard is truncated, its header is not valid safetensors, or the byte ranges of "
    "its tensors overlap, leave holes or do not fit their shapes",
    why="The header alone says which bytes are which tensor. A truncated upload, or a shape whose "
    "product overflows, gives a file that a careful loader refuses and a careless one misreads.",
    repair="Fetch or copy the shard again and compare its size and sha256 with the source; if the "
    "source is broken too, export it again. Do not edit a header by hand.",
    incidents=("https://github.com/safetensors/safetensors/pull/749",),
)
def shard_unreadable(context: RuleContext) -> Iterator[Problem]:
    """Report every shard whose header could not be believed."""
    for shard, why in context.checkpoint.unreadable.items():
        yield Problem(f"{printable(shard)}: {printable(why, 400)}", shard=shard)


@rule(
    "NV002",
    "shard-missing",
    Severity.ERROR,
    fires_when="the index names a file that is not there",
    why="Some loaders take the files they find and never ask for the others: SGLang loaded models "
    "with a shard missing on disk and served them with uninitialised weights.",
    repair="Fetch the missing file, or export again; an interrupted download is resumed by "
    "running it again.",
    incidents=(
        "https://github.com/sgl-project/sglang/pull/32279",
        "https://github.com/sgl-project/sglang/pull/14253",
    ),
)
def shard_missing(context: RuleContext) -> Iterator[Problem]:
    """Report every file that the index names and the directory lacks."""
    checkpoint = context.checkpoint
    placed = Counter(checkpoint.index.weight_map.values()) if checkpoint.index else Counter()
    for shard in checkpoint.missing_shards:
        yield Problem(
            f"the index places {counted(placed[shard], 'tensor')} in {printable(shard)}, which is "
            "not there",
            shard=shard,
            count=placed[shard],
        )


@rule(
    "NV003",
    "indexed-tensor-absent",
    Severity.ERROR,
    fires_when="the index places a tensor in a shard that does not hold it",
    why="A loader that follows the index asks the shard for a tensor and fails; one that goes "
    "through whole files leaves the weight uninitialised. The Hub does not check this: its "
    "maintainers leave it to whoever reads the files.",
    repair="Rebuild the index from the shards' headers. If the tensor is in no shard at all, it "
    "was lost: export it again.",
    incidents=("https://github.com/huggingface/huggingface_hub/issues/4725",),
)
def indexed_tensor_absent(context: RuleContext) -> Iterator[Problem]:
    """Report every name that its shard's header does not have."""
    checkpoint = context.checkpoint
    if checkpoint.index is None:
        return
    for name, shard in checkpoint.index.weight_map.items():
        entry = checkpoint.tensors.get(name)
        # Of a name in two shards, `tensors` has the one the index means, if there is one.
        if shard not in checkpoint.shards or (entry is not None and entry.shard == shard):
            continue
        found = "no shard does" if entry is None else f"{printable(entry.shard)} does"
        yield Problem(
            f"the index places it in {printable(shard)}, which does not hold it; {found}",
            tensor=name,
            shard=shard,
            observed=None if entry is None else entry.shard,
            expected=shard,
        )


@rule(
    "NV004",
    "tensor-not-indexed",
    Severity.WARNING,
    fires_when="a shard holds a tensor that the index does not list; DeepSeek's export script in "
    "ModelOpt leaves out every scale of NVFP4",
    why="Loaders that choose files by the index and then read whole files (vLLM) do not mind. "
    "Those that load tensor by tensor from the index skip what it does not list; a reader that "
    "fills missing scales with ones then serves wrong weights without an error.",
    repair="Rebuild the index from the shards' headers: every tensor's name, and the sum of their "
    "bytes as metadata.total_size.",
    incidents=(
        "https://github.com/osaurus-ai/vmlx-swift/pull/388",
        "https://github.com/NVIDIA/TensorRT-LLM/pull/16437",
        "https://github.com/vllm-project/vllm/pull/54230",
    ),
)
def tensor_not_indexed(context: RuleContext) -> Iterator[Problem]:
    """Report every tensor of an indexed shard that the index leaves out."""
    index = context.checkpoint.index
    if index is None or not index.weight_map:
        return  # without any entry the index itself is at fault: NV010
    stray = stray_shards(context.checkpoint)
    for shard, header in context.checkpoint.shards.items():
        if shard in stray:
            continue
        for entry in header.entries:
            if entry.name not in index.weight_map:
                yield Problem(
                    f"stored in {printable(shard)}, but the index does not list it",
                    tensor=entry.name,
                    shard=shard,
                    offset=entry.start,
                )


@rule(
    "NV005",
    "tensor-duplicated",
    Severity.ERROR,
    fires_when="one name stands in two shards",
    why="Which copy is served depends on the loader: the index's choice, or whichever file was "
    "read last. Checkpoints with a patch shard laid over the original, and stale shards of an "
    "earlier export, load as a mixture.",
    repair="Keep the file that is meant and delete the other, or write the shard again without "
    "the stale tensor; then rebuild the index.",
    incidents=(
        "https://github.com/JustVugg/colibri/issues/1479",
        "https://github.com/vllm-project/vllm/pull/54230",
        "https://github.com/Blaizzy/mlx-vlm/pull/1464",
    ),
)
def tensor_duplicated(context: RuleContext) -> Iterator[Problem]:
    """Report every name that more than one shard holds, with the copy the index chooses."""
    checkpoint = context.checkpoint
    for name, entries in checkpoint.duplicates.items():
        shards = [entry.shard for entry in entries]
        chosen = checkpoint.index.weight_map.get(name) if checkpoint.index else None
        winner = f"the index chooses {printable(chosen)}" if chosen else "no index chooses"
        yield Problem(
            f"stored in {len(shards)} shards: {', '.join(map(printable, shards))}; {winner}",
            tensor=name,
            shard=checkpoint.tensors[name].shard,
            count=len(shards),
            observed=[*shards],
            expected=chosen,
        )


@rule(
    "NV006",
    "stray-shard",
    Severity.WARNING,
    fires_when="a safetensors file lies there that the index does not name, or, without an index, "
    "that is not model.safetensors",
    why="Loaders that take every *.safetensors file merge it into the model. A stray 4-bit file "
    "beside BF16 shards was loaded as part of the model that way.",
    repair="Delete the file if it is left over from an earlier export; if it belongs to the "
    "model, rebuild the index from all headers.",
    incidents=("https://github.com/Blaizzy/mlx-vlm/pull/1464",),
)
def stray_shard(context: RuleContext) -> Iterator[Problem]:
    """Report files that no index leads to."""
    checkpoint = context.checkpoint
    for shard in stray_shards(checkpoint):
        header = checkpoint.shards.get(shard)
        held = "unreadable" if header is None else counted(len(header.entries), "tensor")
        named = "not named by the index" if checkpoint.index else f"beside {SINGLE_SHARD}"
        yield Problem(f"{printable(shard)} ({held}) is {named}", shard=shard)
    present = sorted((*checkpoint.shards, *checkpoint.unreadable))
    if checkpoint.index is None and present and SINGLE_SHARD not in present:
        yield Problem(
            f"{counted(len(present), 'safetensors file')} and no {INDEX_FILE}, the first "
            f"{printable(present[0])}: loaders look for an index or for {SINGLE_SHARD}",
            shard=present[0],
            count=len(present),
        )


@rule(
    "NV007",
    "index-size-wrong",
    Severity.WARNING,
    fires_when="the index's total_size is not the sum of the tensors' bytes",
    why="Tools show it as the size of the model. A wrong sum mostly means that the index was "
    "copied from another checkpoint, or not rewritten after quantisation.",
    repair="Rebuild the index from the shards' headers.",
)
def index_size_wrong(context: RuleContext) -> Iterator[Problem]:
    """Compare total_size with the headers."""
    checkpoint = context.checkpoint
    index = checkpoint.index
    if index is None or index.total_size is None or not index.weight_map:
        return
    named = set(index.weight_map.values())
    lost = sorted((named | index.unsafe.keys()) - checkpoint.shards.keys())
    if lost:
        context.skip(
            "NV007 total_size of the index",
            f"{counted(len(lost), 'shard')} could not be read, the first {printable(lost[0])}",
        )
        return
    if any(name not in checkpoint.tensors for name in index.weight_map):
        return  # the bytes of what is absent are not known: NV003
    held = [entry for shard in named for entry in checkpoint.shards[shard].entries]
    total = sum(entry.nbytes for entry in held)
    # An index that leaves tensors out (NV004) may have summed what it lists.
    listed = sum(entry.nbytes for entry in held if entry.name in index.weight_map)
    if index.total_size not in (total, listed):
        yield Problem(
            f"total_size is {index.total_size:,}, the tensors take {total:,} bytes",
            observed=index.total_size,
            expected=total,
        )


@rule(
    "NV008",
    "unsafe-path",
    Severity.ERROR,
    fires_when="an index entry is absolute or climbs out of the directory, or a file is a link "
    "that leads out",
    why="A loader that follows it reads a file of the machine it runs on and not of the "
    "checkpoint. Links from a snapshot into the blobs of a Hugging Face cache are the cache's own "
    "form and are accepted.",
    repair="Treat the checkpoint as hostile until its origin is clear. Replace the link by the "
    "file, or correct the index to plain file names.",
)
def unsafe_path(context: RuleContext) -> Iterator[Problem]:
    """Report what was not opened because it leads out."""
    named = set(context.checkpoint.index.unsafe) if context.checkpoint.index else set()
    for name, why in sorted(context.checkpoint.unsafe.items()):
        place = "the index names " if name in named else ""
        yield Problem(f"{place}{printable(name)!r}: {printable(why)}; not opened", shard=name)


@rule(
    "NV009",
    "pickle-present",
    Severity.WARNING,
    fires_when="a .bin, .pt, .pth, .pkl or .ckpt file lies beside the shards",
    why="Such files are pickles: to load one is to run whatever code it holds. Nothing here opens "
    "them, but a loader may prefer them to the safetensors files.",
    repair="Delete them from the release; what they hold of weights belongs into safetensors.",
)
def pickle_present(context: RuleContext) -> Iterator[Problem]:
    """Report files that Python would unpickle."""
    for name in context.checkpoint.pickles:
        yield Problem(f"{printable(name)} may hold a pickle; not opened", shard=name)


@rule(
    "NV010",
    "json-invalid",
    Severity.ERROR,
    fires_when="config.json, hf_quant_config.json, generation_config.json or the index is not "
    "valid JSON of the right form",
    why="Python reads NaN and repeated keys without a word where other readers refuse the file, "
    "and a field of the wrong type fails deep inside a loader, or is taken for absent.",
    repair="Correct the named field and write the file with a JSON library.",
)
def json_invalid(context: RuleContext) -> Iterator[Problem]:
    """Report what is wrong with the JSON files."""
    for name, why in context.checkpoint.json_problems:
        yield Problem(f"{printable(name)}: {printable(why, 400)}", shard=name)


RULES: tuple[Rule, ...] = (
    shard_unreadable,
    shard_missing,
    indexed_tensor_absent,
    tensor_not_indexed,
    tensor_duplicated,
    stray_shard,
    index_size_wrong,
    unsafe_path,
    pickle_present,
    json_invalid,
)
