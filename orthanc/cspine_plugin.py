"""Sends every CT Series to the C-Spine Node as soon as Orthanc calls it stable: a Python plugin, nothing to install.

By C-STORE to the modality "cspine", or by STOW-RS where "CSpine" in Orthanc's configuration has a "StowUrl":

    "PythonScript": "/etc/orthanc/cspine_plugin.py",
    "CSpine": {"StowUrl": "http://127.0.0.1:8043/dicom-web/studies", "Token": "..."}

Only Instances of CT SOP Classes are sent, so neither the node's results (SEG, SR) nor a dose report among the slices
ever goes there, and nothing goes round in circles. Whether a Series can be analysed is the node's decision. What is
still to be sent stands in Orthanc's database, and so outlives Orthanc.
"""

import http.client
import json
import queue
import threading
import urllib.error
import urllib.request
import uuid

import orthanc

NODE = "cspine"  # the node's name in "DicomModalities"
CT_SOP_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2",  # CT Image Storage
    "1.2.840.10008.5.1.4.1.1.2.1",  # Enhanced CT Image Storage
    "1.2.840.10008.5.1.4.1.1.2.2",  # Legacy Converted Enhanced CT Image Storage
}
LONGEST_WAIT_S, MAX_ATTEMPTS = 600, 150  # which take a day
NUM_CHANGES = 10_000  # that are looked through at the start
PROPERTY = 4101  # of Orthanc's database: what is noted
OUT_OF_RESOURCES = 0xA700  # Failure Reason (PS3.18 table I.2-2)
LOOK_S = 5.0  # how often it is looked after a job of which Orthanc says nothing
CANCELED = 37  # Orthanc's code of a job that somebody ended
# The last three: what answers is not the node, and its JSON is of another shape.
SEND_ERRORS = (
    OSError,
    ValueError,
    http.client.HTTPException,
    orthanc.OrthancException,
    LookupError,
    TypeError,
    AttributeError,
)

SETTINGS = json.loads(orthanc.GetConfiguration()).get("CSpine", {})
to_send = queue.Queue()  # Series, with the attempts made
ended = queue.Queue()  # jobs, and whether each did what it was to
noted = {"since": None, "stable": None, "series": []}  # as in the database: see note and go_on
noting = threading.Lock()


def get(path):
    return json.loads(orthanc.RestApiGet(path))


def note(add=(), done=None, **more):
    """Series to be sent, or one that is no more; one that grew while it was sent is there twice."""
    with noting:
        noted["series"] += add
        if done in noted["series"]:
            noted["series"].remove(done)
        noted.update(more)
        orthanc.SetGlobalProperty(PROPERTY, json.dumps(noted))


def on_change(change, _level, resource_id):
    if change == orthanc.ChangeType.ORTHANC_STARTED:
        go_on()
    elif change == orthanc.ChangeType.STABLE_SERIES:
        note([resource_id], stable=resource_id)
        to_send.put((resource_id, 0))  # in the background: it must not hold up Orthanc
    elif change in (orthanc.ChangeType.JOB_SUCCESS, orthanc.ChangeType.JOB_FAILURE) and not SETTINGS.get("StowUrl"):
        ended.put((resource_id, change == orthanc.ChangeType.JOB_SUCCESS))


def go_on():
    """Takes up what was to be sent; what is new since the last start and not stable yet, which Orthanc forgot as it
    ended; and what it called stable last, if it did not come to tell us."""
    last = get("/changes?last")["Last"]
    noted.update(json.loads(orthanc.GetGlobalProperty(PROPERTY, json.dumps({"since": last}))))
    since = max(noted["since"], last - NUM_CHANGES)
    changes = get(f"/changes?since={since}&limit={NUM_CHANGES}")["Changes"]
    stable = [change for change in changes if change["ChangeType"] == "StableSeries"]
    # It may have been called stable again since; what is sent twice does no harm.
    told_until = min((change["Seq"] for change in stable if change["ID"] == noted["stable"]), default=-1)
    series_of, found = {}, set()
    for change in changes:
        if change["ChangeType"] == "NewInstance":
            try:
                if change["ID"] not in series_of:
                    series = get(f"/series/{get('/instances/' + change['ID'])['ParentSeries']}")
                    series_of |= dict.fromkeys(series["Instances"], series["ID"])
                found.add(series_of[change["ID"]])
            except orthanc.OrthancException:  # it was deleted
                continue
        elif change["ChangeType"] == "StableSeries" and change["Seq"] <= told_until:
            found.discard(change["ID"])
    note(sorted(found), since=last, stable=None)
    for series_id in noted["series"]:
        to_send.put((series_id, 0))
    threading.Thread(target=send_each, name="cspine", daemon=True).start()


def ct_instances(series_id):
    sop_class = "/instances/{}/metadata/SopClassUid"
    instances = get(f"/series/{series_id}")["Instances"]
    return [item for item in instances if orthanc.RestApiGet(sop_class.format(item)).decode() in CT_SOP_CLASSES]


def run_job(job):
    """What Orthanc says of a job of ours that failed; None of one that did what it was to."""
    job_id = json.loads(orthanc.RestApiPost(f"/modalities/{NODE}/store", json.dumps(job)))["ID"]
    while True:
        try:
            ended_id, is_done = ended.get(timeout=LOOK_S)
        except queue.Empty:  # of one that somebody ends before it runs Orthanc says nothing
            known = get(f"/jobs/{job_id}")
            ended_id, is_done = job_id if known["State"] in ("Success", "Failure") else "", known["State"] == "Success"
        if ended_id == job_id:  # an Orthanc with "JobsHistorySize": 0 does not know it any more
            return None if is_done else get(f"/jobs/{job_id}")


def c_store(instances):
    """One job is one association, so the node need not wait for its quiet time."""
    # Not a synchronous one: no other Python would run in this Orthanc meanwhile.
    job = {"Resources": instances, "Synchronous": False}
    failed = run_job(job)
    if failed is None or failed["ErrorCode"] == CANCELED:
        return
    # The node answers, so what it takes shall not wait for what it refuses. Only then: where nobody answers, such a
    # job would wait for that at each Instance, and Orthanc would call it a success.
    if "DIMSE status" in failed.get("ErrorDetails", ""):
        run_job(job | {"Permissive": True})
    raise OSError(failed["ErrorDescription"])


def stow(instances):
    """One request for a whole Series, for which the node counts as one sender; never more than a slice in memory."""
    boundary = uuid.uuid4().hex

    def body():
        for item in instances:
            yield f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
            yield orthanc.RestApiGet(f"/instances/{item}/file")
            yield b"\r\n"
        yield f"--{boundary}--\r\n".encode()

    headers = {"Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}'}
    if SETTINGS.get("Token"):
        headers["Authorization"] = f"Bearer {SETTINGS['Token']}"
    request = urllib.request.Request(SETTINGS["StowUrl"], data=body(), headers=headers, method="POST")
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=300) as answer:
            failed = json.load(answer).get("00081198", {}).get("Value", [])
        reasons = [item["00081197"]["Value"][0] for item in failed]
        if OUT_OF_RESOURCES in reasons:  # some were taken before
            raise OSError("the node cannot store all of it now; its log says why")
        if failed:
            orthanc.LogError(f"cspine: NOT SENT: {len(failed)} Instances that the node refused; its log says why")
    except urllib.error.HTTPError as error:
        if error.code not in (400, 409, 413, 415):  # these would be answered the same again
            raise
        orthanc.LogError(f"cspine: NOT SENT: the node answered {error}; its log says why")


def send_each():
    """Series after Series; one that fails is tried again, later and later, for a day."""
    while True:
        series_id, attempts = to_send.get()
        try:
            instances = ct_instances(series_id)
        except orthanc.OrthancException as error:  # it was deleted, say
            orthanc.LogError(f"cspine: NOT SENT: Series {series_id}: Orthanc does not give it out: {error}")
            instances = []
        try:
            if instances:
                orthanc.LogWarning(f"cspine: sending {len(instances)} Instances of Series {series_id}")
                (stow if SETTINGS.get("StowUrl") else c_store)(instances)
            note(done=series_id)
        except SEND_ERRORS as error:
            wait_s = min(5 * 2**attempts, LONGEST_WAIT_S)
            is_last = attempts + 1 == MAX_ATTEMPTS
            when = "when Orthanc is restarted" if is_last else f"in {wait_s} s"
            orthanc.LogError(f"cspine: NOT SENT: Series {series_id}: {error}. Tried again {when}")
            if not is_last:
                timer = threading.Timer(wait_s, to_send.put, [(series_id, attempts + 1)])
                timer.daemon = True
                timer.start()


orthanc.RegisterOnChangeCallback(on_change)
