# Any image with Node 26 and apt-get.
ARG BASE=node:26-slim

FROM ${BASE} AS page
WORKDIR /app
COPY package.json package-lock.json .npmrc tsconfig.json ./
RUN npm ci --ignore-scripts
COPY web ./web
RUN node_modules/.bin/vite build --config web/vite.config.ts

FROM ${BASE}

RUN apt-get update \
  && apt-get install -y --no-install-recommends bash ca-certificates git python3 tini \
  && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY package.json package-lock.json .npmrc ./
# Node comes with the image; the npm package that brings it elsewhere is a development dependency.
RUN npm ci --omit=dev --ignore-scripts && npm cache clean --force
COPY src ./src
COPY tasks ./tasks
COPY --from=page /app/dist/web ./dist/web

RUN mkdir /data .compiled && chown node:node /data .compiled
USER node
# Name lookups share Node's thread pool with files and compression: a resolver that hangs must not take it all.
ENV DATA_DIR=/data HOST=0.0.0.0 PORT=3000 UV_THREADPOOL_SIZE=16
# Large logs go back to the system at once: by default glibc keeps blocks of up to 32 MB for itself, once it has seen one.
ENV MALLOC_MMAP_THRESHOLD_=131072
# Started once, here: what is compiled then makes each start quicker, and the process smaller by a quarter.
ENV NODE_COMPILE_CACHE=/app/.compiled
RUN DATA_DIR=/tmp/first-start HOST=127.0.0.1 PORT=0 timeout -s TERM 5 node src/main.ts || rm -r /tmp/first-start
VOLUME /data
EXPOSE 3000
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
  CMD ["node", "-e", "fetch(`http://127.0.0.1:${process.env.PORT}${process.env.BASE_PATH ?? ''}/health/ready`).then((answer) => process.exit(answer.ok ? 0 : 1), () => process.exit(1))"]
# Passes on signals, and reaps what tasks leave behind.
ENTRYPOINT ["tini", "--"]
CMD ["node", "--disable-sigusr1", "--max-semi-space-size=2", "src/main.ts"]
