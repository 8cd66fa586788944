"""Dumps that lie: a run is checked for being what it says before anything is concluded from it.

A hook that copies a buffer too early, a position too far or not at all gives numbers that look like
a fault of the model. Each such way leaves a trace of its own.

Contract:
    missing     a point that is there at some layers of its kind, or for some prompts, and not at
                others; a layer between others; logits of some prompts only
    rows        another number of rows than the prompt has tokens; a whole multiple of it is a sign
                of the rows of multi-token prediction
    width       reference and candidate have rows of different width
    repeated    a point bit for bit as at another layer or under other tokens, or one of its rows
                as the row before, under another token. Points that depend on the token alone
                (those of the first layer) are left out of the comparison of rows
    shifted     rows are those of the neighbouring tokens: see `shifted`
    sum         hidden is not the sum of what the layer was given and what its two blocks added. In
                a dtype of unit roundoff u, two sums that are rounded and four values that are
                stored may be off by u times the magnitudes of all of them
    vocabulary  logits of more entries than the other run's: padding, which is cut
    layers      layers beyond the model's own are those of multi-token prediction, which are held
                against bounds alone (`predicting`)

A problem is fatal where it makes comparison wrong; what was cut or left out is a note.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from nvfp4check.activations import HIDDEN, POINTS, ROUTER_POINTS, Run, opened
from nvfp4check.agreement.layers import VALUE_POINTS, Skip
from nvfp4check.agreement.problems import Problem as Problem
from nvfp4check.agreement.shifted import shifted_rows
from nvfp4check.findings import CheckError


@dataclass
class Integrity:
    """What is wrong with two runs, and what of them cannot be compared."""

    problems: list[Problem] = field(default_factory=list)
    skip: set[Skip] = field(default_factory=set)

    @property
    def fatal(self) -> bool:
        """Whether something makes the comparison wrong."""
        return any(problem.fatal for problem in self.problems)

    def add(self, problem: Problem) -> None:
        """Add a problem, and leave its place out where it has one of its own."""
        self.problems.append(problem)
        layer, point, prompt = problem.layer, problem.point, problem.prompt
        absent = problem.kind in ("missing", "rows", "width")
        if absent and layer is not None and point is not None and prompt is not None:
            self.skip.add((layer, point, prompt))


def held(run: Run, layer: int) -> dict[tuple[str, str], tuple[int, ...]]:
    """Return the shape of what a run holds of a layer, by prompt and point.

    Raises:
        CheckError: A point is not one row a token.
    """
    with opened(run.layer_file(layer)) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for name, shape in shapes.items():
        if name.rpartition("/")[2] in POINTS and len(shape) != 2:
            raise CheckError(
                f"{run.layer_file(layer)}: {name!r} has the shape {list(shape)}, expected one row "
                "for each token"
            )
    split = ((name.rpartition("/"), shape) for name, shape in shapes.items())
    return {(prompt, point): shape for (prompt, _, point), shape in split}


def check_runs(reference: Run, candidate: Run, prompts: tuple[str, ...]) -> Integrity:
    """Check both runs, each for itself and against the other."""
    found = Integrity()
    layers = _own_layers(reference, candidate, found)
    for name, run in (("reference", reference), ("candidate", candidate)):
        for problem in _missing(name, run, layers, prompts):
            found.add(problem)
        for problem in _repeated(name, run, layers, prompts, found.skip):
            found.add(problem)
        for problem in _sums(name, run, layers, prompts, found.skip):
            found.add(problem)
    for problem in _unrecorded(reference, candidate, layers, prompts):
        found.add(problem)
    for problem in _mismatched(reference, candidate, layers, prompts, found.skip):
        found.add(problem)
    for problem in shifted_rows(reference, candidate, layers, prompts, found.skip):
        found.add(problem)
    return found


def _own_layers(reference: Run, candidate: Run, found: Integrity) -> tuple[int, ...]:
    """Return the layers of the model itself."""
    own = set(reference.layers) | set(candidate.layers)
    for name, run in (("reference", reference), ("candidate", candidate)):
        count = run.info.config.get("num_hidden_layers")
        beyond = [layer for layer in run.layers if type(count) is int and layer >= count]
        if beyond:
            found.add(
                Problem(
                    kind="layers",
                    run=name,
                    message=f"layers {beyond} lie beyond the model's {count}: those of multi-token "
                    "prediction, held against bounds alone",
                    fatal=False,
                )
            )
            own.difference_update(beyond)
    return tuple(sorted(own))


def _missing(
    name: str, run: Run, layers: tuple[int, ...], prompts: tuple[str, ...]
) -> Iterator[Problem]:
    """Find the points that are there elsewhere, and rows that are too many or too few."""
    present = [layer for layer in layers if layer in run.layers]
    if not present:
        if run.info.activations not in (None, "none"):
            yield Problem(
                kind="missing",
                run=name,
                message=f"its run.json says activations {run.info.activations!r}, but no layer "
                "was recorded",
                fatal=False,
            )
        return
    for layer in range(present[0], present[-1] + 1):
        if layer not in run.layers:
            yield Problem(
                kind="missing",
                run=name,
                layer=layer,
                message=f"layer {layer} was not recorded",
                fatal=False,
            )
    here = {layer: held(run, layer) for layer in present}
    everywhere = {point for held in here.values() for _, point in held}
    for layer in present:
        routed = any(point in ROUTER_POINTS for _, point in here[layer])
        for point in sorted(everywhere):
            if point in ROUTER_POINTS and not routed:
                continue  # a dense layer
            for prompt in prompts:
                if (prompt, point) not in here[layer]:
                    yield Problem(
                        kind="missing",
                        run=name,
                        layer=layer,
                        point=point,
                        prompt=prompt,
                        message=f"{point} of layer {layer}, prompt {prompt!r}, was not recorded",
                        fatal=False,
                    )
                    continue
                rows, tokens = here[layer][prompt, point][0], _tokens(run, prompt)
                if rows != tokens:
                    yield Problem(
                        kind="rows",
                        run=name,
                        layer=layer,
                        point=point,
                        prompt=prompt,
                        message=f"{point} of layer {layer}, prompt {prompt!r}: "
                        f"{rows_message(rows, tokens)}",
                    )


def rows_message(rows: int, tokens: int) -> str:
    """Say what a wrong number of rows may come from."""
    text = f"{rows} rows for {tokens} tokens"
    if tokens and rows > tokens and rows % tokens == 0:
        return f"{text}: rows of multi-token prediction, or of a batch, lie among them"
    return f"{text}: padding or a part of the prompt"


def _tokens(run: Run, prompt: str) -> int:
    return next(info.tokens for info in run.info.prompts if info.id == prompt)


def _repeated(
    name: str, run: Run, layers: tuple[int, ...], prompts: tuple[str, ...], skip: set[Skip]
) -> Iterator[Problem]:
    """Find buffers that were read again and not written."""
    places: dict[tuple[str, bytes], tuple[int, str]] = {}
    tokens = {prompt: run.tokens(prompt) for prompt in prompts}
    first = min(run.layers, default=0)
    for layer in (layer for layer in layers if layer in run.layers):
        points = [p for p in run.points(layer) if p in VALUE_POINTS and p not in ROUTER_POINTS]
        for point in points:
            for prompt in (p for p in prompts if (layer, point, p) not in skip):
                rows = run.point(layer, prompt, point)
                if not rows.count_nonzero():
                    continue
                content = rows.contiguous().view(torch.uint8)
                digest = hashlib.sha256(content.numpy().tobytes()).digest()
                other_layer, other = places.setdefault((point, digest), (layer, prompt))
                same_tokens = torch.equal(tokens[other], tokens[prompt])
                if other_layer != layer or not same_tokens:
                    yield Problem(
                        kind="repeated",
                        run=name,
                        layer=layer,
                        point=point,
                        prompt=prompt,
                        message=f"{point} of layer {layer}, prompt {prompt!r}, is bit for bit that "
                        f"of layer {other_layer}, prompt {other!r}: a buffer was read again and "
                        "not written",
                    )
                elif layer > first and len(rows) == len(tokens[prompt]):
                    again = (content[1:] == content[:-1]).flatten(1).all(-1)
                    again &= tokens[prompt][1:] != tokens[prompt][:-1]
                    if again.any():
                        token = int(again.nonzero()[0]) + 1
                        yield Problem(
                            kind="repeated",
                            run=name,
                            layer=layer,
                            point=point,
                            prompt=prompt,
                            message=f"{point} of layer {layer}, prompt {prompt!r}: row {token} is "
                            f"bit for bit row {token - 1}, under another token "
                            f"({int(again.sum())} such rows)",
                        )


def _sums(
    name: str, run: Run, layers: tuple[int, ...], prompts: tuple[str, ...], skip: set[Skip]
) -> Iterator[Problem]:
    """Find states that are not the sum of what was added to them."""
    if run.info.perturb or run.info.inputs:  # noise came after the sum; layers began elsewhere
        return
    for layer in layers:
        if layer not in run.layers or layer - 1 not in run.layers:
            continue
        needed = ("attn_output", "mlp_output", HIDDEN)
        if any(p not in run.points(layer) for p in needed) or HIDDEN not in run.points(layer - 1):
            continue
        for prompt in prompts:
            keys = [(layer, point, prompt) for point in needed] + [(layer - 1, HIDDEN, prompt)]
            if any(key in skip for key in keys):
                continue
            parts = [run.point(at, prompt, point) for at, point, _ in keys]
            if len({part.shape for part in parts}) > 1:
                continue  # rows of different width are a problem of their own
            unit = max(torch.finfo(part.dtype).eps for part in parts) / 2
            attention, mlp, after, before = (part.double() for part in parts)
            middle = before + attention
            terms = (attention, mlp, after, before, middle)
            bound = unit * torch.stack([term.abs() for term in terms]).sum(0) * (1 + 4 * unit)
            bad = ((middle + mlp - after).abs() > bound).any(-1) & after.isfinite().all(-1)
            if bad.any():
                yield Problem(
                    kind="sum",
                    run=name,
                    layer=layer,
                    point=HIDDEN,
                    prompt=prompt,
                    message=f"hidden of layer {layer}, prompt {prompt!r}, is not the sum of the "
                    f"layer's input and its two blocks at {int(bad.sum())} of {len(bad)} tokens, "
                    f"first {int(bad.nonzero()[0])}: a point is recorded elsewhere than its name "
                    "says, or not of this pass",
                )


def _unrecorded(
    reference: Run, candidate: Run, layers: tuple[int, ...], prompts: tuple[str, ...]
) -> Iterator[Problem]:
    """Find points of the reference that the candidate recorded at no layer."""
    both = [layer for layer in layers if layer in reference.layers and layer in candidate.layers]
    points, recorded = (
        {point for layer in both for prompt, point in held(run, layer) if prompt in prompts}
        for run in (reference, candidate)
    )
    for point in sorted((points - recorded) & {*VALUE_POINTS, *ROUTER_POINTS}):
        yield Problem(
            kind="missing",
            run="candidate",
            point=point,
            message=f"{point} was not recorded at any layer",
            fatal=False,
        )


def _mismatched(
    reference: Run,
    candidate: Run,
    layers: tuple[int, ...],
    prompts: tuple[str, ...],
    skip: set[Skip],
) -> Iterator[Problem]:
    """Find rows of different width, and layers that only one run has."""
    for layer in layers:
        if not (reference.layers and candidate.layers):
            return
        if layer not in reference.layers or layer not in candidate.layers:
            lacking = "candidate" if layer in reference.layers else "reference"
            within = reference if lacking == "reference" else candidate
            if not within.layers[0] < layer < within.layers[-1]:  # else reported above
                yield Problem(
                    kind="missing",
                    run=lacking,
                    layer=layer,
                    message=f"layer {layer} was not recorded",
                    fatal=False,
                )
            continue
        left, right = held(reference, layer), held(candidate, layer)
        for prompt in prompts:
            for point in (*VALUE_POINTS, "router_experts"):
                key = (prompt, point)
                if key not in left or key not in right or (layer, point, prompt) in skip:
                    continue
                if left[key] != right[key]:
                    yield Problem(
                        kind="width",
                        run="both",
                        layer=layer,
                        point=point,
                        prompt=prompt,
                        message=f"{point} of layer {layer}, prompt {prompt!r}: reference "
                        f"{list(left[key])}, candidate {list(right[key])}; is it a shard of "
                        "tensor parallelism?",
                    )
