// @anthropic-ai/sdk: messages, streams, and its tool runner, against a node.
import assert from "node:assert";
import Anthropic from "@anthropic-ai/sdk";
import { betaZodTool } from "@anthropic-ai/sdk/helpers/beta/zod";
import { z } from "zod";

const { NODE_URL: url, NODE_MODEL: model } = process.env;
const client = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0, timeout: 120_000 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const ask = { model, max_tokens: 60, messages };

const message = await client.messages.create({ ...ask, temperature: 0 });
assert.match(message.content[0].text, /Paris/);
const stream = client.messages.stream({ ...ask, temperature: 0 });
assert.equal((await stream.finalMessage()).content[0].text, message.content[0].text);
const { input_tokens } = await client.messages.countTokens({ model, messages });
const { usage } = message;
assert.equal(input_tokens, usage.input_tokens + usage.cache_read_input_tokens);

// A grammar makes the model call; the runner calls the tool, sends its result, and goes on until there is no call.
let called = 0;
const tool = betaZodTool({
  name: "get_weather",
  description: "The weather of a city.",
  inputSchema: z.object({ city: z.enum(["Paris", "Rome"]) }),
  run: ({ city }) => {
    called += 1;
    return `Sunny in ${city}.`;
  },
});
for (const streaming of [false, true]) {
  const runner = client.beta.messages.toolRunner({
    ...ask,
    stream: streaming,
    max_iterations: 3,
    tools: [tool],
    tool_choice: { type: "tool", name: "get_weather", disable_parallel_tool_use: true },
  });
  let turns = 0;
  for await (const turn of runner) {
    if (streaming) await turn.finalMessage();
    turns += 1;
  }
  assert.equal(turns, 3);
}
assert.equal(called, 6);

await assert.rejects(client.messages.create({ ...ask, model: "nobody" }), (error) => {
  assert(error instanceof Anthropic.NotFoundError);
  assert(error.requestID);
  return true;
});
await assert.rejects(client.messages.batches.list(), Anthropic.NotFoundError);
