"""The audit: was this checkpoint made from that base?

vector        a glance at the 16 elements of a block
kernel        one pass over a weight: codes and scales held against the base's values
numbers       the tables and bounds that the pass needs
edges         blocks of zeros and at the ends of the range, by the reference
sources       the base's values by rows
by_fp8        the same, taken through FP8 128 x 128
weights       one quantised weight, streamed by pieces of rows
smoothing     columns divided by what their input is multiplied by, as AWQ does
fitted        the same, where the factors are in the linear before and stored nowhere
norms         whether all that a changed norm feeds undoes the change
copies        one weight that should have been copied
pairs         which weight is held against which, and how
results       what is found in one weight, in plain numbers
passes        the pairs of a checkpoint, by work items
signs         who a weight is, by the signs of a few of its elements
foreign       weights that are another's, named
regions       rows and columns that are, named
patterns      what several of them have in common
global_scale  which global scales an amax gives
outcome       what all this says of a checkpoint
whole         the audit of a checkpoint
"""
