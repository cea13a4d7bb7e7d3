// OpenAI's client and Vercel's AI SDK: streams, a loop with a tool, an answer as an object, a kept conversation.
import assert from "node:assert";
import OpenAI from "openai";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const model = process.env.MODEL;
const baseURL = process.env.OPENAI_BASE_URL;
const question = "What is the weather in Paris?";

async function openai() {
  const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
  const runner = client.chat.completions.runTools({
    model,
    messages: [{ role: "user", content: question }],
    tools: [
      {
        type: "function",
        function: {
          name: "get_weather",
          parse: JSON.parse,
          parameters: { type: "object", properties: { city: { type: "string" } } },
          function: ({ city }) => `sunny in ${city}`,
        },
      },
    ],
  });
  assert.match(await runner.finalContent(), /sunny/);
  const stream = client.chat.completions.stream({ model, messages: [{ role: "user", content: "hi" }] });
  assert.match(await stream.finalContent(), /sunny/);
  const first = await client.responses.create({ model, input: "hi" });
  const second = await client.responses.create({ model, input: "more", previous_response_id: first.id });
  assert.match(second.output_text, /sunny/);
}

async function vercel() {
  const own = createOpenAI({ baseURL, apiKey: "none" });
  const compatible = createOpenAICompatible({ name: "own", baseURL, apiKey: "none", supportsStructuredOutputs: true });
  const weather = tool({
    description: "The weather of a city.",
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => `sunny in ${city}`,
  });
  for (const each of [own(model), own.chat(model), compatible(model)]) {
    const name = `${each.provider}`;
    const { text } = await generateText({ model: each, prompt: question, tools: { weather }, stopWhen: stepCountIs(4) });
    assert.match(text, /sunny/, name);
    const streamed = streamText({ model: each, prompt: question, tools: { weather }, stopWhen: stepCountIs(4) });
    assert.match(await streamed.text, /sunny/, name);
    const { object } = await generateObject({ model: each, prompt: "hi", schema: z.object({ city: z.string() }) });
    assert.equal(object.city, "Paris", name);
  }
}

let failed = 0;
for (const client of [openai, vercel]) {
  try {
    await client();
    console.log(`${client.name}: ok`);
  } catch (error) {
    failed = 1;
    console.log(`${client.name}: ${error.stack?.slice(0, 1500)} ${JSON.stringify(error.responseBody ?? error.cause ?? "")}`);
  }
}
process.exit(failed);
