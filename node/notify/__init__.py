"""Notifications: a web address, a mailbox, an HL7 or FHIR receiver learns what became of a case.

`notice.py` is what is said, one module puts it into the words of each kind of target, `clock.py` says when. Who wants
to know what is `node/targets.py`. A notification never holds up a case, and names a patient only where that is
switched on.
"""
