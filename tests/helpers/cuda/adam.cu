// Adam's step is followed by the rest of a selection: both, for the emulator.
#include "../../../csrc/cuda/topk.cu"

#include "../../../csrc/cuda/adam.cu"
