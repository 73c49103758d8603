# For boxes with NVIDIA GPUs: torch's own wheels bring CUDA, the host brings the driver and the NVIDIA container toolkit.
FROM python:3.12-slim-bookworm AS build
WORKDIR /src
RUN pip install --no-cache-dir build==1.6.1
COPY settings.ini setup.py pyproject.toml MANIFEST.in README.md LICENSE CHANGELOG.md constraints.txt ./
COPY videotg_r1 videotg_r1
COPY nbs/stages nbs/stages
COPY nbs/explore nbs/explore
COPY params params
COPY tests/data/world tests/data/world
RUN python -m build --wheel --outdir /dist .

FROM python:3.12-slim-bookworm
ENV PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 HF_HUB_DISABLE_TELEMETRY=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY constraints.txt /dist/constraints.txt
COPY --from=build /dist/videotg_r1-*.whl /dist/
RUN pip install --no-cache-dir -c /dist/constraints.txt "$(echo /dist/videotg_r1-*.whl)[gpu]" \
    && useradd --uid 1000 --create-home vtg && mkdir /vtg && chown vtg:vtg /vtg
USER 1000
# runs, reports, params and data of the user: mount a folder here
WORKDIR /vtg
ENTRYPOINT ["vtg"]
CMD ["doctor"]
