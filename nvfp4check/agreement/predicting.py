"""Layers of multi-token prediction: compared where the reference has bounds that they are held by.

Contract:
    rows      row i of a prompt is given token i + 1, and further ones for further layers: a prompt
              has as many rows less as there are layers up to it. One with other rows is refused
    points    eh_proj, those of a decoder layer, and at the end final_hidden or logits, where both
              runs kept them over the whole vocabulary
    share     of none: what came in is not the state of the layer before
"""

from collections.abc import Iterator

from nvfp4check.activations import EH_PROJ, MTP_ENDS, Run, mtp_folder, opened
from nvfp4check.agreement.integrity import Problem
from nvfp4check.agreement.layers import VALUE_POINTS, PointAgreement, Sums, values

#: In the order of the computation.
POINTS = (EH_PROJ, *VALUE_POINTS, *MTP_ENDS)


def compare_predictors(
    reference: Run, candidate: Run, prompts: tuple[str, ...], problems: list[Problem]
) -> Iterator[PointAgreement]:
    """Compare the layers of prediction that both recorded, and that the reference has bounds of.

    What cannot be compared is added to `problems`.
    """
    own = {*reference.own_layers, *candidate.own_layers}
    for layer in sorted(set(reference.layers) & set(candidate.layers) - own):
        if not reference.bounded(layer):
            continue
        there = [_held(run, layer) for run in (reference, candidate)]
        for point in POINTS:
            sums = Sums()
            for prompt in prompts:
                if not all(f"{prompt}/{point}" in names for names in there):
                    continue
                r, c = values(reference, candidate, layer, prompt, point)
                rows = reference.rows(layer, prompt)
                if r.shape != c.shape or len(r) != rows:
                    problems.append(
                        Problem(
                            kind="rows",
                            run="candidate",
                            layer=layer,
                            point=point,
                            prompt=prompt,
                            message=f"{point} of layer {layer}, prompt {prompt!r}, is "
                            f"{list(c.shape)}, the reference's {list(r.shape)}, expected {rows} "
                            "rows; left out",
                            fatal=True,
                        )
                    )
                    continue
                sums.add(prompt, r, c)
            if sums.errors:
                yield sums.finish(layer, point, None)


def _held(run: Run, layer: int) -> set[str]:
    """Return what a run holds of a layer, as `<prompt>/<point>`."""
    with opened(run.layer_file(layer)) as file:
        names = set(file.keys())
    for point, file_name in MTP_ENDS.items():
        path = mtp_folder(run.path, layer) / file_name
        if path.is_file():
            with opened(path) as file:
                names |= {f"{prompt}/{point}" for prompt in file.keys()}  # noqa: SIM118
    return names
