"""The cards that a total is compared with.

A class is given the memory of the smallest usual card in it, as ``nvidia-smi`` prints it: what is sold as
24 GB is 22.5 GiB on an A10.
"""

MIB = 2**20

# name -> bytes
CARDS = {
    "16 GB": 15_356 * MIB,  # A2 with ECC; RTX A4000 and 4080 have 16,376
    "24 GB": 23_028 * MIB,  # A10 and L4; RTX 3090 and 4090 have 24,564
    "40 GB": 40_536 * MIB,  # A100 40 GB
    "48 GB": 46_068 * MIB,  # L40S, A40 with ECC; RTX A6000 has 49,140
    "80 GB": 81_251 * MIB,  # A100 80 GB; H100 has 81,559
    "141 GB": 143_771 * MIB,  # H200
}


def cards_that_fit(device_bytes: int) -> list[str]:
    """The names of the card classes with at least ``device_bytes``, smallest first."""
    return [name for name, capacity in CARDS.items() if device_bytes <= capacity]
