"""``python -m megatron_fope``; guarded because checkpoint writers of 0.17 re-import the main module."""

from megatron_fope.tools.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
