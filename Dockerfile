# The node in a container: docker build -t cspine-node .
#   docker run -p 11112:11112 -v cspine-data:/data cspine-node         serve, results to /data/results
#   docker run --rm cspine-node demo                                   watch it work on two made-up studies
# The case list, OHIF and DICOMweb: web in the settings below, -p 8043:8043, and a token by docker exec ... cspine token make.
# A folder in place of the volume must belong to 10001, and a configuration be readable for it. --read-only works.
# Podman keeps the health check with: podman build --format docker
# Settings of your own: -v ./config.yaml:/config.yaml:ro, with data_dir /data, receive.host 0.0.0.0 and the peers in
# receive.allow; with a list there, add - {ae_title: HEALTHCHECK, address: 127.0.0.1} for the health check, which speaks
# plain DICOM: with receive.tls, run with --no-healthcheck.

FROM python:3.11-slim AS build
# Where torch's build comes from. For an NVIDIA GPU: --build-arg TORCH_INDEX=https://pypi.org/simple, and
# docker run --gpus all.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/cspine
WORKDIR /source
COPY constraints.txt .
# Only torch itself is taken from that index; what it needs comes with the rest. What it brings for C++ programs is 145 MB.
RUN /opt/cspine/bin/pip install --constraint constraints.txt --no-deps --index-url "$TORCH_INDEX" torch \
    && cd /opt/cspine/lib/python3*/site-packages/torch && rm -rf include test
COPY pyproject.toml README.md LICENSE ./
COPY model model
COPY node node
COPY orthanc orthanc
COPY training training
RUN /opt/cspine/bin/pip install --constraint constraints.txt '.[orthanc]'

# OHIF, the web viewer. Which version, and its checksum, is said in the script.
FROM node:22-slim AS viewer
COPY node/web/get_ohif.sh .
RUN sh get_ohif.sh /viewer

FROM python:3.11-slim
ENV PATH=/opt/cspine/bin:$PATH PYTHONUNBUFFERED=1 MPLCONFIGDIR=/tmp/matplotlib
COPY --from=build /opt/cspine /opt/cspine
COPY --from=viewer /viewer /opt/cspine/viewer
RUN useradd --uid 10001 --no-create-home --home-dir /nonexistent cspine \
    && install --directory --owner=cspine --group=cspine --mode=0750 /data
COPY --chmod=0644 container.yaml /config.yaml
USER cspine
# The cspine command takes ./config.yaml where none is named.
WORKDIR /
VOLUME /data
EXPOSE 11112 8043
HEALTHCHECK --interval=60s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "-m", "pynetdicom", "echoscu", "127.0.0.1", "11112", "--calling-aet", "HEALTHCHECK", "--called-aet", "CSPINE"]
ENTRYPOINT ["cspine"]
CMD ["serve"]
