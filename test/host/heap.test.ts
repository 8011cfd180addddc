import { expect, test } from 'vitest';
import { describeHost, useHost } from '../support/memcg.js';

describeHost('the heap of a handler', () => {
  const newHost = useHost();

  test('may grow unless it is told not to', async () => {
    const free = await newHost().handler();
    expect(free.capabilities.youngGeneration).toMatchObject({ fixed: false, whyNot: null });
    const fixed = await newHost().handler({ fixedHeap: true });
    expect(fixed.capabilities.youngGeneration).toMatchObject({ fixed: true, whyNot: null });
  });

  test('is not filled with what a program has mapped and not touched', async () => {
    const handler = await newHost().handler();
    const before = process.memoryUsage.rss();
    const { WebAssembly } = globalThis as unknown as { WebAssembly: { Memory: new (size: object) => object } };
    const memories = Array.from({ length: 100 }, () => new WebAssembly.Memory({ initial: 48, maximum: 48 })); // 3 MiB each
    for (let round = 0; round < 3; round++) {
      Array.from({ length: 200_000 }, (_, index) => ({ index })); // collections
      await new Promise((resolve) => setTimeout(resolve, 200));
    }
    expect(process.memoryUsage.rss() - before).toBeLessThan(100 * 2 ** 20);
    expect(memories).toHaveLength(100);
    await handler.close();
  });
});
