// The handler under test, in a process of its own: watches the memcg given and prints each report as a line of JSON.
// Ends when its stdin does. With --no-drill nothing is done before a kill is needed; --fixed-heap does all that can be.
import { lowestPriority, OomHandler } from '../../dist/index.js';

const [path, side] = process.argv.slice(2);
process.on('SIGINT', () => {}); // Ctrl-C reaches the whole process group; whoever started this ends it in order

const handler = await OomHandler.open({ drill: side !== '--no-drill', fixedHeap: side === '--fixed-heap' });
const { scheduling } = handler.capabilities;
if (scheduling?.got !== 'realtime') {
  await handler.close();
  throw new Error(`no comparison without real-time scheduling: ${scheduling?.whyNot}`);
}
handler.on('report', (report) => console.log(JSON.stringify(report)));
handler.on('warning', (message) => console.error(`reprieve warns: ${message}`));
handler.on('alarm', (message) => console.error(`reprieve's alarm: ${message}`));
process.stdin.resume().once('end', () => handler.close());
await handler.watch(`memcg:${path}`, {
  policy: lowestPriority,
  jobs: { service: { priority: 90 }, leak: { priority: 10 } },
});
console.log('ready');
