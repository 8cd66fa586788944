"""How far a correct run of a layer may lie from the reference, derived from what it may round.

`layer` follows the layer as it is computed, by the rules of `linear`, `pointwise`, `attention` and
`routing`; `straddles` counts the codes that may flip, `arithmetic` says what is rounded and with
what risk, `uncertain` is what is carried along.
"""
