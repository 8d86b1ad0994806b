"""Sends every CT Series to the C-Spine Node as soon as Orthanc calls it stable: a Python plugin, nothing to install.

By C-STORE to the modality "cspine", or by STOW-RS where "CSpine" in Orthanc's configuration has a "StowUrl":

    "PythonScript": "/etc/orthanc/cspine_plugin.py",
    "CSpine": {"StowUrl": "http://127.0.0.1:8043/dicom-web/studies", "Token": "..."}

Only Instances of CT SOP Classes are sent, so neither the node's results (SEG, SR) nor a dose report among the slices
ever goes there, and nothing goes round in circles. Whether a Series can be analysed is the node's decision.
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
LONGEST_WAIT_S = 600
OUT_OF_RESOURCES = 0xA700  # Failure Reason (PS3.18 table I.2-2)

SETTINGS = json.loads(orthanc.GetConfiguration()).get("CSpine", {})
to_send = queue.Queue()  # Series for STOW-RS, with the attempts made


def ct_instances(series_id):
    instances = json.loads(orthanc.RestApiGet(f"/series/{series_id}"))["Instances"]
    sop_class = "/instances/{}/metadata/SopClassUid"
    return [item for item in instances if orthanc.RestApiGet(sop_class.format(item)).decode() in CT_SOP_CLASSES]


def on_change(change, _level, resource_id):
    if change == orthanc.ChangeType.STABLE_SERIES:
        if SETTINGS.get("StowUrl"):
            to_send.put((resource_id, 0))  # in the background: it must not hold up Orthanc
        elif instances := ct_instances(resource_id):
            orthanc.LogWarning(f"cspine: sending {len(instances)} Instances of Series {resource_id}")
            # A job in the background, too. One job is one association, so the node need not wait for its quiet time.
            job = json.dumps({"Resources": instances, "Synchronous": False})
            orthanc.RestApiPost(f"/modalities/{NODE}/store", job)
    elif change == orthanc.ChangeType.JOB_FAILURE:
        job = json.loads(orthanc.RestApiGet(f"/jobs/{resource_id}"))
        if job["Type"] == "DicomModalityStore":
            node = json.loads(orthanc.RestApiGet(f"/modalities/{NODE}/configuration"))
            if job["Content"]["RemoteAet"] == node["AET"]:
                told = f"{job['ErrorDescription']}. When the node answers, resubmit job {resource_id}"
                orthanc.LogError(f"cspine: NOT SENT: {told}")


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


def send_by_stow():
    """Series after Series; one that fails is tried again, later and later, until Orthanc is restarted."""
    while True:
        series_id, attempts = to_send.get()
        try:
            if instances := ct_instances(series_id):
                orthanc.LogWarning(f"cspine: sending {len(instances)} Instances of Series {series_id}")
                stow(instances)
        except orthanc.OrthancException as error:  # it was deleted, say
            orthanc.LogError(f"cspine: NOT SENT: Series {series_id}: Orthanc does not give it out: {error}")
        except (OSError, ValueError, http.client.HTTPException) as error:
            wait_s = min(5 * 2**attempts, LONGEST_WAIT_S)
            orthanc.LogError(f"cspine: NOT SENT: Series {series_id}: {error}. Tried again in {wait_s} s")
            timer = threading.Timer(wait_s, to_send.put, [(series_id, attempts + 1)])
            timer.daemon = True
            timer.start()


orthanc.RegisterOnChangeCallback(on_change)
if SETTINGS.get("StowUrl"):
    threading.Thread(target=send_by_stow, name="cspine", daemon=True).start()
