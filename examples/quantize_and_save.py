"""Quantize a pipeline once, save it, and load the small copy ever after.

Runs with an embedded model on a CPU. With a hub id in MODEL it is the same call; that was NOT RUN here.
"""

from pathlib import Path

import fastdiff

MODEL = "shapes-unet"
CONFIG = {"quant": {"method": "w8a16"}}  # 8-bit weights, computed in 16 or 32 bits: nothing to calibrate


def main(directory: Path = Path("shapes-unet-w8a16")) -> None:
    pipe = fastdiff.load(MODEL)
    print(fastdiff.quantize(pipe, CONFIG))  # bytes before and after, layers, what was left alone
    fastdiff.save(pipe, directory)
    small = fastdiff.load(directory)  # a stock pipeline with quantized layers; cache it like any other
    with fastdiff.accelerate(small, "balanced") as fast:
        small("a small green ring", num_inference_steps=8, guidance_scale=3).images[0].save(directory / "ring.png")
        print(fast.report)


if __name__ == "__main__":
    main()
