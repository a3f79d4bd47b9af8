"""What a forked process has to do before threads of it use torch."""

import torch


def renew_threads() -> None:
    """The first thread that asks after a fork makes torch's pool anew; of two at once (transformers reads files in
    threads) one finds it half made, and fails: "Invalid thread pool!"."""
    torch.set_num_threads(torch.get_num_threads())
