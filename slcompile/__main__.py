"""Makes ``python -m slcompile`` the same as the command ``slcompile``."""

from __future__ import annotations

from slcompile.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
