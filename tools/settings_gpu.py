"""Print the effect of each setting that acts on a GPU alone; needs a GPU with Transformer Engine.

Each is a run of a tiny GPT, compared with the same run without it: losses, the kernels of a step
and the peak memory.

    uv run tools/settings_gpu.py [PATTERN]
"""

import sys

from campaign import Campaign

TEST = "tests/loop_with_gpt/test_gpu_settings.py"


def main() -> None:
    """Print what each setting changes."""
    pattern = sys.argv[1] if len(sys.argv) > 1 else ""
    options = {"pattern": pattern}
    for found in Campaign(name="settings_gpu", test=TEST, options=options, on_gpu=True):
        print(f"{found['setting']} {found['base'][:3]}: {found['result']}", flush=True)


if __name__ == "__main__":
    main()
