// ollama for Node: chat, streams, generate with a context, and what is known of models, against a node.
import assert from "node:assert";
import { Ollama } from "ollama";

const { NODE_URL: url, NODE_MODEL: model } = process.env;
const client = new Ollama({ host: url });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const options = { temperature: 0, num_predict: 40, num_ctx: 4096 };

const whole = (await client.chat({ model, messages, options })).message.content;
assert.match(whole, /Paris/);
let streamed = "";
for await (const part of await client.chat({ model, messages, options, stream: true })) streamed += part.message.content;
assert.equal(streamed, whole);
const first = await client.generate({ model, prompt: "Hello", options });
assert((await client.generate({ model, prompt: "Go on", options, context: first.context })).response.length > 0);
const schema = { type: "object", properties: { city: { enum: ["Paris", "Rome"] } }, required: ["city"] };
assert(JSON.parse((await client.chat({ model, messages, format: schema, options })).message.content).city);

assert.equal((await client.list()).models[0].name, model);
assert.equal((await client.ps()).models[0].name, model);
assert((await client.show({ model })).capabilities.includes("completion"));
assert.equal((await client.pull({ model })).status, "success");
await assert.rejects(client.pull({ model: "nobody" }), /does not exist/);
await assert.rejects(client.embed({ model, input: "a" }), /generates text/);
