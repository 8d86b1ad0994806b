"""Storage commitment as SCP: Storage Commitment Push Model (PS3.4 Annex J). The node commits what it holds.

A request is noted in the database and answered; what is held is judged when the report is made. The report goes over
the requester's own association if it keeps that open, else over a new one to where the configuration says it listens,
and is tried again until it has arrived, whatever dies meanwhile.

The other way round, `received.py` notes the reports that PACS send on what deliveries asked them to commit to.
"""

from node.commitment.clock import report_due
from node.commitment.received import note_report
from node.commitment.scp import COMMITMENT_STATUSES, SOP_CLASS, CommitmentScp

__all__ = ["COMMITMENT_STATUSES", "SOP_CLASS", "CommitmentScp", "note_report", "report_due"]
