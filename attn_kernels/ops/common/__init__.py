"""What the operators share, one idea per file.

- ``operator``: registration, saved tensors, double backward; ``layout``: contiguous and channels_last tensors.
- ``tiling``: launch configuration of a tensor; ``gate_plan``: that of a channel gate.
- ``device``: the GPU that it is for, and the environment's switch.
- ``tile``: loads and stores of a tile; ``epilogue``: residual + ReLU behind an operator, and its gradient.
- ``reduce``: maxima with their index, sums of partial sums; ``matmul``: products of a layer's weights.
- ``activations``; ``batch_norm`` and ``moments``: norms on the host and on the device.
- ``scalar``: numbers as arguments of kernels.
- ``pools``, ``squeeze``, ``excite`` and ``excite_bwd``: the pools and the MLP of a channel gate; ``spatial_grad``: the
  gradient of a spatial gate behind it.
- ``grid_sync``: dependent phases in one launch.
"""
