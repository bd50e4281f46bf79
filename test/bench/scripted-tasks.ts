/**
 * Task services with scripted containers, each on a Unix socket, in a process of their own as kilnd is: for numbers of
 * tasks whose virtual machines would not fit. Arguments: a folder, how many. Sends the sockets' paths to its parent.
 */
import { createServer } from 'node:net';
import { join } from 'node:path';
import { Bench } from '../unit/shim/task-bench.ts';

const [folder = '', count = '0'] = process.argv.slice(2);
const paths: string[] = [];
for (let n = 0; n < Number(count); n += 1) {
  const path = join(folder, `scripted-${n}`);
  const bench = new Bench();
  const server = createServer((socket) => bench.server.serve(socket));
  await new Promise<void>((resolve) => server.listen(path, resolve));
  paths.push(path);
}
process.send?.(paths);
