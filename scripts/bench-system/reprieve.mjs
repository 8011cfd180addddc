// reprieve as a handler of the whole machine, with what its owner knows of the jobs. Prints each report as a line of JSON.
import { lowestPriority, OomHandler } from '../../dist/index.js';

const handler = await OomHandler.open();
handler.on('report', (report) => console.log(JSON.stringify(report)));
handler.on('warning', (message) => console.log(`warning: ${message}`));
handler.on('alarm', (message) => console.log(`alarm: ${message}`));
await handler.watch('system', {
  policy: lowestPriority,
  jobs: { 'bench/service': { priority: 90 }, 'bench/innocent-*': { priority: 50 }, 'bench/leak': { priority: 10 } },
});
console.log('watching');
