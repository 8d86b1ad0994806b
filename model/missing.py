"""What tells that a Series which can be analysed is not all of it. Pure; called by `read_series`, which warns of it.

Evenly spaced slices say nothing of it: every second Instance of a Series makes an even stack, too, and so does its
lower half. The source's count tells; else InstanceNumbers do, though some are not given slice by slice: numbering may
run on through a Study, or be shared by Series that were made at once. So of those it is said "may".
"""

from collections.abc import Sequence

from model.stack import SliceHeader, Stack


def missing_instances(
    headers: Sequence[SliceHeader], stack: Stack, num_at_source: int | None = None, *, is_interrupted: bool = False
) -> str:
    """Why Instances of a Series are, or may be, missing, in a sentence; "" if nothing tells so.

    headers: of all that is here of the Series. stack: of those, the slices. num_at_source: Instances that the source of
    the Series holds; None if that is not known. is_interrupted: its sender broke off, or had Instances refused. Bridged
    slices, of which the stack warns, are not told of again.
    """
    num_here = len({header.sop_instance_uid for header in headers})
    if num_at_source is not None and num_at_source >= num_here:
        return "" if num_at_source == num_here else f"Its source holds {num_at_source} Instances, and {num_here} came."
    if told := _by_numbers(headers, stack):
        return told
    return "Its sender broke off, or Instances were refused: some may be missing." if is_interrupted else ""


def _by_numbers(headers: Sequence[SliceHeader], stack: Stack) -> str:
    """What InstanceNumbers tell."""
    numbers = {header.sop_instance_uid: header.instance_number for header in headers}
    known = {number for number in numbers.values() if number is not None}
    if len(known) < len(numbers) or len(numbers) < 2:
        return ""  # without numbers, or repeated ones as some scanners write them
    # What was left out of the stack, such as a scout, may be numbered apart: it fills gaps, and makes none.
    slices = {headers[i].instance_number or 0 for i in stack.order}
    first, last = min(slices), max(slices)
    num_missing = sum(number not in known for number in range(first, last + 1))
    num_bridged = stack.grid.shape[0] - len(stack.order)
    if num_missing > num_bridged:
        return f"Of InstanceNumbers {first} to {last}, {num_missing} are not here: Instances may be missing."
    if min(known) > 1:
        return f"InstanceNumbers begin at {min(known)}: Instances before that may be missing."
    return ""
