// The peer in node: child_process.spawn. Usage and output are those of posix_spawn.c.
import { spawn } from "node:child_process";
import { performance } from "node:perf_hooks";

const [mode, seconds, levels, program, ...args] = process.argv.slice(2);
const capture = mode === "capture";

function once() {
  return new Promise((resolve, reject) => {
    const stdio = ["inherit", capture ? "pipe" : "inherit", "inherit"];
    const child = spawn(program, args, { stdio });
    if (capture) {
      const chunks = [];
      child.stdout.on("data", (chunk) => chunks.push(chunk));
    }
    child.on("error", reject);
    child.on(capture ? "close" : "exit", (code) =>
      code === 0 ? resolve() : reject(new Error(`exit status ${code}`)),
    );
  });
}

async function rate(level, length) {
  const begin = performance.now();
  const end = begin + length * 1000;
  let done = 0;
  async function work() {
    do {
      await once();
      done += 1;
    } while (performance.now() < end);
  }
  await Promise.all(Array.from({ length: level }, work));
  return (done / (performance.now() - begin)) * 1000;
}

const found = {};
for (const level of levels.split(",")) {
  await rate(Number(level), Number(seconds) / 10);
  found[level] = await rate(Number(level), Number(seconds));
}
console.log(JSON.stringify(found));
