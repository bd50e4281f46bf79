/** iperf3 of Debian with its libraries: in a network of the test's, and in an image. */
import { execFileSync } from 'node:child_process';
import { readFileSync, realpathSync } from 'node:fs';
import { basename, join } from 'node:path';
import { busyboxLayer, type Image, type LayerEntry } from './images.ts';
import { iperf3Tree } from './paths.ts';

/** The program's command line, in a tree of Debian's. */
export function iperf3Command(tree: string): string[] {
  const folders = ['lib/x86_64-linux-gnu', 'usr/lib/x86_64-linux-gnu'].map((folder) => join(tree, folder));
  return [join(tree, 'lib64/ld-linux-x86-64.so.2'), '--library-path', folders.join(':'), join(tree, 'usr/bin/iperf3')];
}

/** Where a container has it. */
export const iperf3InImage = ['/iperf3/loader', '--library-path', '/iperf3', '/iperf3/iperf3'];

function iperf3Layer(): LayerEntry[] {
  const [loader = '', ...args] = iperf3Command(iperf3Tree());
  const program = args.pop() ?? '';
  const libraries = execFileSync(loader, [...args, '--list', program], { encoding: 'utf8' })
    .split('\n')
    .map((line) => /=> (\/\S+) \(0x/.exec(line)?.[1])
    .filter((path) => path !== undefined);
  const copy = (path: string, name: string): LayerEntry => {
    return { kind: 'file', path: `iperf3/${name}`, mode: 0o755, content: readFileSync(realpathSync(path)) };
  };
  return [
    { kind: 'dir', path: 'iperf3' },
    copy(loader, 'loader'),
    copy(program, 'iperf3'),
    ...libraries.filter((path) => !basename(path).startsWith('ld-')).map((path) => copy(path, basename(path))),
  ];
}

export const iperf3Image: Image = {
  name: 'docker.io/kiln/iperf3:test',
  get layers() {
    return [busyboxLayer(), iperf3Layer()];
  },
};
