"""The sandbox for programs that a model wrote: `judge` returns which checks they pass."""

from __future__ import annotations

from collm.sandbox.pool import Job, Sandbox, Verdict, judge

__all__ = ["Job", "Sandbox", "Verdict", "judge"]
