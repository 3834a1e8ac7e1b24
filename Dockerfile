# Serves one agent. From the root of the repository:
#   collm export runs/demo --agent builder_0 exported/builder_0
#   docker build -t collm-agent .
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/exported/builder_0:/agent:ro" collm-agent --agent builder_0
# With a key: docker run ... -e KEY=... collm-agent --agent builder_0 --api-key-env KEY
# For a GPU: docker build --build-arg TORCH_INDEX=https://pypi.org/simple ..., and docker run --gpus all ...
FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY collm ./collm
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url "$TORCH_INDEX" ".[serve]" && \
    useradd --create-home agent
USER agent
EXPOSE 8000
HEALTHCHECK --interval=10s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["collm", "serve", "/agent", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--help"]
