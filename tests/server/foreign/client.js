// Calls the server with Node's own gRPC client, unmodified, and prints what came back as JSON.
//
//     node client.js HOST:PORT SCENARIO DIGITS [CA]
//
// DIGITS is a file of canonical images, 784 bytes each, and CA one of certificates, for TLS. NODE_PATH names the folder
// of @grpc/grpc-js and @grpc/proto-loader (scripts/foreign-clients). What is right is said by test_foreign_clients.py.
"use strict";

const diagnostics = require("node:diagnostics_channel");
const fs = require("node:fs");
const path = require("node:path");
const grpc = require("@grpc/grpc-js");
const { loadSync } = require("@grpc/proto-loader");

const PIXELS = 784;
const FRAMES = 500;

const [address, scenario, digitsFile, caFile] = process.argv.slice(2);
const digits = fs.readFileSync(digitsFile);
const images = Array.from({ length: digits.length / PIXELS }, (_, i) => digits.subarray(i * PIXELS, (i + 1) * PIXELS));
const clients = [];

function clientOf(name, proto, options = {}) {
  const folder = path.join(__dirname, "../../../protos");
  const loaded = loadSync(proto, { includeDirs: [folder], longs: Number, defaults: true, oneofs: true });
  const Service = name.split(".").reduce((part, key) => part[key], grpc.loadPackageDefinition(loaded));
  const credentials = caFile ? grpc.credentials.createSsl(fs.readFileSync(caFile)) : grpc.credentials.createInsecure();
  const client = new Service(address, credentials, options);
  clients.push(client);
  return client;
}

function classifierOf(options) {
  return clientOf("mnist.v1.DigitClassifier", "mnist/v1/digit_classifier.proto", options);
}

function metadataOf(entries) {
  const metadata = new grpc.Metadata();
  for (const [key, value] of Object.entries(entries)) metadata.set(key, value);
  return metadata;
}

// `metadata` has a list of values by each key; binary ones are { type: "Buffer", data: [...] }.
function statusOf({ code, details, metadata }) {
  return { code: grpc.status[code], details, metadata: metadata.toJSON() };
}

// A unary call's answer, or { code, details, metadata } of its error.
function call(client, method, request, metadata = {}, options = {}) {
  return new Promise((resolve) => {
    client[method](request, metadataOf(metadata), options, (error, answer) => resolve(error ? statusOf(error) : answer));
  });
}

// A stream: `write` frames, wait for the answer's next blocks with `next`, or for its end with `status`.
function open(client, metadata = {}, options = {}) {
  const stream = client.StreamClassify(metadataOf(metadata), options);
  const received = stream[Symbol.asyncIterator]();
  stream.on("error", () => {}); // `status` tells it
  return {
    status: new Promise((resolve) => stream.on("status", (status) => resolve(statusOf(status)))),
    next: async () => (await received.next()).value.blocks,
    write: (number, pixels) => stream.write({ firstSequence: number, frames: { pixels } }),
    end: () => stream.end(),
    cancel: () => stream.cancel(),
  };
}

function repeated(count) {
  return Buffer.concat(Array.from({ length: count }, (_, i) => images[i % images.length]));
}

const scenarios = {
  async unary() {
    const classifier = classifierOf();
    const alone = await Promise.all(images.map((pixels) => call(classifier, "Classify", { pixels })));
    const together = await call(classifier, "Classify", { pixels: digits, includeLogits: true });
    return { alone, together, model: await call(classifier, "GetModel", {}) };
  },

  async stream() {
    const stream = classifierOf().StreamClassify();
    const blocks = [];
    stream.on("data", (response) => blocks.push(...response.blocks));
    const status = new Promise((resolve) => stream.on("status", resolve));
    for (let i = 0; i < FRAMES; i++) {
      const pixels = i % 100 === 99 ? Buffer.alloc(PIXELS - 1) : images[i % images.length];
      stream.write({ firstSequence: i, frames: { pixels } });
    }
    stream.end();
    return { frames: FRAMES, blocks, status: statusOf(await status) };
  },

  async deadline() {
    const classifier = classifierOf();
    await call(classifier, "GetModel", {}); // so that there is a connection
    return {
      client: await open(classifier, {}, { deadline: Date.now() + 300 }).status,
      // Here the client knows of no deadline, only the server does.
      server: await open(classifier, { "grpc-timeout": "300m" }).status,
      after: await call(classifier, "Classify", { pixels: images[0] }),
    };
  },

  // For a server that answers 20 images at once, and waits a minute for them.
  async cancel() {
    const classifier = classifierOf();
    const left = open(classifier, { "x-request-id": "leaves" });
    const stays = open(classifier, { "x-request-id": "stays" });
    left.write(0, images[0]);
    await call(classifier, "GetModel", {});
    left.cancel();
    const status = await left.status;
    stays.write(1, digits);
    const blocks = await stays.next();
    stays.end();
    return {
      left: status,
      stays: { blocks, status: await stays.status },
      call: await call(classifier, "Classify", { pixels: digits }),
    };
  },

  async errors() {
    const classifier = classifierOf();
    const inference = clientOf("inference.GRPCInferenceService", "inference/grpc_inference_service.proto");
    const bad = { pixels: Buffer.alloc(PIXELS - 1) };
    return {
      named: await call(classifier, "Classify", bad, { "x-request-id": "of Node", "some-bin": Buffer.from([0, 255]) }),
      unnamed: await call(classifier, "Classify", bad),
      foreign: await call(inference, "ModelInfer", { modelName: "50 % größer, 数字 ✓" }),
      unknown: await new Promise((resolve) => {
        const same = (buffer) => buffer;
        const name = "/mnist.v1.DigitClassifier/Nothing";
        classifier.makeUnaryRequest(name, same, same, Buffer.alloc(0), (error) => resolve(statusOf(error)));
      }),
    };
  },

  async large() {
    const classifier = classifierOf();
    const mebibytes = (number) => repeated(Math.floor((number * 2 ** 20) / PIXELS));
    return {
      fits: await call(classifier, "Classify", { pixels: mebibytes(3) }),
      tooLarge: await call(classifier, "Classify", { pixels: mebibytes(20) }),
      after: await call(classifier, "Classify", { pixels: images[0] }),
    };
  },

  // The images repeat, so that what is compressed is far smaller. The server's first answer tells what it reads.
  async gzip() {
    const sockets = [];
    diagnostics.subscribe("net.client.socket", ({ socket }) => sockets.push(socket));
    const classifier = classifierOf({ "grpc.default_compression_algorithm": grpc.compressionAlgorithms.gzip });
    const pixels = repeated(1000);
    const answers = [await call(classifier, "Classify", { pixels })];
    answers.push(await call(classifier, "Classify", { pixels }));
    const bytes = sockets.reduce((sum, socket) => sum + socket.bytesWritten, 0);
    return { answers, bytes };
  },
};

scenarios[scenario]().then((result) => {
  clients.forEach((client) => client.close());
  console.log(JSON.stringify(result));
});
