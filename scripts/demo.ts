/** The demo: what a stock containerd does with Kiln, shown and then removed. Run it by `npm run demo`. */
import { release } from 'node:os';
import { busyboxImage } from '../test/support/images.ts';
import { leftoverKinds } from '../test/support/leftovers.ts';
import { runtime, underKiln } from '../test/support/paths.ts';
import { Scene } from '../test/support/scene.ts';
import { readTimeline, type TimelineMark } from '../test/support/timeline.ts';

const version = '1.6';
const say = (text: string): void => void process.stdout.write(`${text}\n`);

const explained: Readonly<Record<string, string>> = {
  launcher: 'containerd calls the launcher',
  request: 'kilnd gets the Create request',
  'vmm-spawned': 'QEMU runs',
  'vm-restored': 'the VM runs, a clone of the template',
  'kernel-up': 'kernel is up, agent begins',
  'agent-connected': 'agent has called the host',
  'rootfs-ready': 'root filesystem is a disk',
  'rootfs-attached': 'disk is in the VM',
  created: 'container is created',
  started: 'process is started',
  exited: 'process has ended',
  deleted: 'VM is gone',
};

function timelineTable(marks: readonly TimelineMark[]): string {
  const first = marks[0]?.atMs ?? 0;
  const rows = marks.map(({ name, atMs }, index) => {
    const since = (atMs - first).toFixed(0).padStart(8);
    const step = (atMs - (marks[index - 1]?.atMs ?? atMs)).toFixed(0).padStart(8);
    return `  ${name.padEnd(17)}${since}${step}   ${explained[name] ?? ''}`;
  });
  return ['start timeline         at ms    +ms', ...rows].join('\n');
}

async function show(scene: Scene): Promise<void> {
  say(`A private containerd ${version} runs in ${scene.dir}, with an image of busybox made on the spot.\n`);
  const guestKernel = await demonstrate(scene, 'first');
  say(`\nkernel of the host       ${release()}`);
  say(`kernel of the container  ${guestKernel}`);
  if (underKiln && guestKernel === release()) throw new Error('the container ran on the kernel of the host');
  say('\nThe first start booted a virtual machine and saved it as a template. Each one after it starts from there:\n');
  await demonstrate(scene, 'next');
  if (underKiln) say(`\n${timelineTable(await readTimeline(scene.kilndLog, 'next'))}`);
}

/** Runs a container and says how long that took; returns the release of its kernel. */
async function demonstrate(scene: Scene, id: string): Promise<string> {
  const command = ['uname', '-a'];
  say(`$ ctr run --rm --runtime ${runtime} ${busyboxImage.name} ${id} ${command.join(' ')}`);
  const began = performance.now();
  const result = await scene.run(id, command);
  const tookMs = performance.now() - began;
  process.stdout.write(result.stdout);
  if (result.code !== 0) throw new Error(`ctr ended with ${result.code}: ${result.stderr}\n${await scene.logs()}`);
  say(`ctr took ${(tookMs / 1000).toFixed(1)} s from its start to its end.`);
  return result.stdout.toString().split(' ')[2] ?? '';
}

const scene = new Scene({ version });
let interrupted = false;
for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  // The containers' ctr gets the terminal's signal too and ends, so that `show` fails and everything is taken down.
  process.on(signal, () => {
    interrupted = true;
  });
}
try {
  await scene.setUp();
  await show(scene);
} catch (error) {
  process.exitCode = 1;
  process.stderr.write(`${interrupted ? 'interrupted' : `the demo failed: ${String(error)}`}\n`);
}
try {
  await scene.tearDown();
  say(`Everything is removed; looked for and not found: ${leftoverKinds.join(', ')}.`);
} catch (error) {
  process.exitCode = 1;
  process.stderr.write(`${String(error)}\n`);
}
