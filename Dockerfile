# docker build -t normfree .                                  for a CPU
# docker build -t normfree:cuda --build-arg TORCH=cu128 .     for NVIDIA GPUs; docker run --gpus all
#
# docker run --rm -it --shm-size=2g -v "$PWD:/work" --user "$(id -u):$(id -g)" normfree                  the demo
# docker run --rm -it --shm-size=2g -v "$PWD:/work" --user "$(id -u):$(id -g)" normfree train --data photos
#
# /work is the current folder; runs are written to /work/runs. Processes that load images hand batches over in /dev/shm,
# of which a container has 64 MB unless --shm-size gives it more.

FROM python:3.12-slim AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
# cpu, or the name of a CUDA build at https://download.pytorch.org/whl, for example cu128
ARG TORCH=cpu
# tini passes signals on, so that `docker stop` saves and ends a run
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 tini \
    && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir torch torchvision --index-url "https://download.pytorch.org/whl/$TORCH"
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/normfree-*.whl)[demo,onnx,serve]" \
    && python -c "from normfree.native.library import library; assert library() is not None, 'no compiled kernels'" \
    && normfree --version
# for users without a home in the image
ENV HOME=/tmp
WORKDIR /work
ENTRYPOINT ["tini", "--", "normfree"]
CMD ["train"]
