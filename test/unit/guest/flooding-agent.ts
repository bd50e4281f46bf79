/**
 * An agent in a process of its own, so that its memory is not counted as ours: `flooding-agent.ts NAME BYTES` listens on
 * an abstract socket and sends so many bytes as output, in chunks of 64 KiB that are numbered by their first byte, as fast
 * as flow control lets it.
 */
import { createServer } from 'node:net';
import { outputOf, ScriptedAgent } from './scripted-agent.ts';

const [, , name = '', bytes = '0'] = process.argv;
const chunk = 64 * 1024;

const agent = new ScriptedAgent({
  readOutput: (call) => {
    let sent = 0;
    const pump = () => {
      while (sent < Number(bytes)) {
        const data = Buffer.alloc(chunk, sent / chunk);
        sent += chunk;
        if (!call.write(outputOf(data))) {
          call.once('drain', pump);
          return;
        }
      }
    };
    // As the agent does: the end comes when all is delivered.
    call.on('data', ({ delivered }) => {
      if (Number(delivered) === Number(bytes)) call.end();
    });
    pump();
  },
});
createServer((socket) => agent.serve(socket)).listen(`\0${name}`, () => process.send?.('listening'));
process.on('disconnect', () => process.exit());
