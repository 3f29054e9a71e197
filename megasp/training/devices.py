"""Peak speeds of GPUs, which MFU compares with."""

import re

import torch

_PEAKS: tuple[tuple[str, float | None, float | None], ...] = (
    # Words of torch.cuda.get_device_name(), dense bf16 TFLOP/s, fp32 TFLOP/s (without TF32). The first match counts.
    # NVIDIA prints bf16 with sparsity in most of these sheets: halved here.
    ("GB200", 2500, 80),  # GB200 NVL72 product page, 1/72 of it
    ("B200", 2250, 80),  # Blackwell data sheet of 2024, at 1000 W
    ("GH200", 989, 67),  # GH200 data sheet
    ("H200 NVL", 836, 60),  # H200 data sheet
    ("H200", 989, 67),  # H200 data sheet, SXM
    ("H100 NVL", 836, 60),  # H100 data sheet
    ("H100 PCIe", 756, 51),  # H100 data sheet of 2022
    ("H100", 989, 67),  # H100 data sheet, SXM; its device name ends in "HBM3"
    ("H800", 989, 67),  # H100 with slower NVLink
    ("H20", 148, 44),  # H20 data sheet
    ("A100", 312, 19.5),  # A100 data sheet
    ("A800", 312, 19.5),  # A100 with slower NVLink
    ("A30", 165, 10.3),  # A30 data sheet
    ("A40", 149.7, 37.4),  # A40 data sheet
    ("A10", 125, 31.2),  # A10 data sheet
    ("L40S", 362, 91.6),  # L40S data sheet
    ("L40", 181, 90.5),  # L40 data sheet
    ("L4", 121, 30.3),  # L4 data sheet
    ("RTX A6000", 154.8, 38.7),  # RTX A6000 data sheet
    ("RTX 4090", 165.2, 82.6),  # Ada architecture white paper, appendix A, fp32 accumulation
    ("RTX 3090", 71, 35.6),  # Ampere GA102 architecture white paper, fp32 accumulation
    ("V100", None, 15.7),  # V100 data sheet, SXM2; it has no bf16
    ("MI300X", 1307.4, 163.4),  # AMD Instinct MI300X data sheet
)


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak of the device in `dtype` (bf16 or fp32), in TFLOP/s; None for a CPU and for a GPU not in the table."""
    return known_peak(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None


def known_peak(device_name: str, dtype: torch.dtype) -> float | None:
    """Dense peak of the GPU of that name; None if it is not in the table."""
    for words, bf16, fp32 in _PEAKS:
        if re.search(rf"\b{words}\b", device_name):
            return {torch.bfloat16: bf16, torch.float16: bf16, torch.float32: fp32}.get(dtype)
    return None
