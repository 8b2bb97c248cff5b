"""uvicorn's command line, without the library that watches source files for it: `python -m jobs.serve` takes what `uvicorn` takes."""

from __future__ import annotations

from jobs.light import absent

with absent("watchfiles"):
    from uvicorn.main import main

if __name__ == "__main__":
    main(prog_name="uvicorn")
