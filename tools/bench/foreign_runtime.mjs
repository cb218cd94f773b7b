// llama.cpp's side of `gguf_foreign.py`, through node-llama-cpp: a GGUF file is asked by token ids, and cuts
// texts into tokens. Reads one JSON object on stdin, writes one on stdout; knows nothing of qadapt.

import {text} from "node:stream/consumers";
import {getLlama, LlamaLogLevel} from "node-llama-cpp";

const AS_IT_IS = {temperature: 1, topK: 0, topP: 1, minP: 0, seed: 0};

const task = JSON.parse(await text(process.stdin));
const llama = await getLlama({
    gpu: false, build: "never", skipDownload: true, progressLogs: false, logLevel: LlamaLogLevel.error,
    maxThreads: task.threads
});
const model = await llama.loadModel({modelPath: task.model});
const context = await model.createContext({
    contextSize: task.contextTokens, sequences: 1,
    ...(task.lora ? {lora: {adapters: [{filePath: task.lora}]}} : {})
});
const sequence = context.getSequence();

async function greedyAnswer(prompt) {
    const answer = [];
    await sequence.clearHistory();
    for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        if (task.endIds.includes(token))
            break;
        answer.push(token);
        if (answer.length >= task.maxNewTokens)
            break;
    }
    return answer;
}

async function nextProbabilities(prompt) {
    await sequence.clearHistory();
    for await (const {probabilities} of sequence.evaluateWithMetadata(prompt, {probabilities: true}, AS_IT_IS))
        return [...probabilities];
}

const answers = [];
for (const prompt of task.prompts)
    answers.push(await greedyAnswer(prompt));
const probabilities = [];
for (const prompt of task.scored)
    probabilities.push(await nextProbabilities(prompt));

process.stdout.write(JSON.stringify({
    answers,
    probabilities,
    tokens: task.texts.map((each) => model.tokenize(each, true)),
    addsBos: model.tokens.shouldPrependBosToken,
    endsKnown: task.endIds.map((token) => model.isEogToken(token)),
    release: llama.llamaCppRelease.release,
    warnings: model.getWarnings()
}));
await llama.dispose();
