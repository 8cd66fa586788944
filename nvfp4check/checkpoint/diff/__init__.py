"""The difference of two checkpoints, weight by weight, in meaning.

classes       what a pair of weights is to one another, and what fails a comparison
results       what was found, in plain numbers
pairing       which weight is held against which, fused and split ones included
operands      the values of one side, by rows, and how far an original may lie from them
kernel        two NVFP4 weights in bytes, chunk by chunk
kernel_sums   their sums in integers, and where the largest difference may lie
kernel_steps  their codes' steps apart, and those beyond the bound
scale_pairs   what a pair of block scales makes of every pair of codes
vectors       vectors of 64 bytes, for whatever processor there is
nvfp4_pair    the comparison of two NVFP4 weights
values_pair   the comparison of any two weights, by values
compare       the class of one pair
through_fp8   other roundings on the way to one side, and whether they explain a pair
diagnosis     faults and conventions recognised in one pair: scalars, codes, scales, values
moved         weights that are another's: experts permuted, halves swapped, layers shifted
configs       configurations, by what they mean to an engine
files         files and index, by what a loader makes of them
effect        what a difference does to the output of its linear
run           the whole: work items, journal, engine
"""
