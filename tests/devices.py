"""GPUs to ask for plans and decisions, none of which is needed."""

from __future__ import annotations

from fastlstm.problem import Device

GPUS = {
    "RTX 3090": Device("cuda", "sm_86", "NVIDIA GeForce RTX 3090", 82),
    "A100": Device("cuda", "sm_80", "NVIDIA A100-SXM4-80GB", 108),
    "L4": Device("cuda", "sm_89", "NVIDIA L4", 58),
    "RTX 4090": Device("cuda", "sm_89", "NVIDIA GeForce RTX 4090", 128),
    "H100": Device("cuda", "sm_90", "NVIDIA H100 80GB HBM3", 132),
    "H200": Device("cuda", "sm_90", "NVIDIA H200", 132),
    "B200": Device("cuda", "sm_100", "NVIDIA B200", 148),
    "RTX 5090": Device("cuda", "sm_120", "NVIDIA GeForce RTX 5090", 170),
    "MI300X": Device("hip", "gfx942", "AMD Instinct MI300X", 304),
    "RX 7900 XTX": Device("hip", "gfx1100", "AMD Radeon RX 7900 XTX", 48),
}
