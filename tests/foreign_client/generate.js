// Calls Generate as a program that knows nothing but the .proto files would.
//
//   node generate.js PROTOS HOST:PORT < request.json
//
// The request is a GenerateRequest in JSON, bytes in base64 ("media": [{"data": "…"}]). One JSON object comes out:
// {"messages": […]} with every message of the stream and, if it failed, {"error": {"code", "message", "details"}}.
'use strict';

const fs = require('node:fs');
const path = require('node:path');
const grpc = require('@grpc/grpc-js');
const protoLoader = require('@grpc/proto-loader');

const [protos, address] = process.argv.slice(2);
const files = ['diptych/v1/preprocess.proto', 'google/rpc/status.proto', 'google/rpc/error_details.proto'];
const definition = protoLoader.loadSync(
  files.map((name) => path.join(protos, name)),
  { includeDirs: [protos], keepCase: true, enums: String, longs: Number, oneofs: true },
);
const { PreprocessService } = grpc.loadPackageDefinition(definition).diptych.v1;

function readRequest() {
  const request = JSON.parse(fs.readFileSync(0, 'utf8'));
  for (const media of request.prompt.media || []) {
    media.data = Buffer.from(media.data, 'base64');
  }
  return request;
}

// The details of an error travel as a google.rpc.Status in the trailers.
function readDetails(metadata) {
  const [trailer] = metadata.get('grpc-status-details-bin');
  if (trailer === undefined) return [];
  const status = definition['google.rpc.Status'].deserialize(trailer);
  return (status.details || []).map((any) => {
    const type = any.type_url.split('/').pop();
    return { type, ...definition[type].deserialize(any.value) };
  });
}

const client = new PreprocessService(address, grpc.credentials.createInsecure());
const messages = [];
const call = client.Generate(readRequest(), { deadline: Date.now() + 60_000 });
call.on('data', (message) => messages.push(message));
call.on('error', () => {}); // reported by 'status', which comes once, whatever happened
call.on('status', ({ code, details, metadata }) => {
  const error = { code, message: details, details: readDetails(metadata) };
  client.close();
  process.stdout.write(JSON.stringify(code === grpc.status.OK ? { messages } : { messages, error }));
});
