import { programIdentity } from '../../host/program.ts';
import type { TemplateDriver } from '../vmm.ts';
import { manyCalls } from './agent-call.ts';
import { configurationText, configureAndStart } from './configure.ts';
import type { FirecrackerHost, FirecrackerOptions } from './options.ts';
import { loadSnapshot, requireSnapshot, saveSnapshot, snapshotFiles } from './snapshot.ts';
import { startFirecracker } from './start.ts';
import { requireVersionWithTemplates } from './version.ts';
import { FirecrackerVm, SavableFirecrackerVm } from './vm.ts';

/**
 * Undefined with huge pages: memory that was saved from them can be restored through a program of the user's alone
 * (docs/hugepages.md, "Huge Pages and Snapshotting": userfaultfd), which Kiln does not have.
 */
export function templatesOf(options: FirecrackerOptions, host: FirecrackerHost): TemplateDriver | undefined {
  if (options.hugePages) return undefined;
  return {
    files: snapshotFiles,
    clonesAreCold: false,
    fingerprint(shape) {
      const jail = options.jail();
      // Where the VM runs decides on the paths in its snapshot.
      const where = jail === undefined ? ['no jail'] : ['jailed by', programIdentity(jail.jailer)];
      return ['firecracker', programIdentity(options.firecracker), ...where, ...configurationText(shape, options)];
    },
    async boot(config, template, signal) {
      const start = { options, host, config, portable: true, when: 'at start' };
      const parts = await startFirecracker(
        start,
        async (started) => {
          requireVersionWithTemplates(started.version);
          await configureAndStart(started, config, options);
        },
        signal,
      );
      const agent = manyCalls(parts.place, parts.agent, parts.resources);
      return new SavableFirecrackerVm({ ...parts, agent }, (saving) => saveSnapshot(parts, template, saving));
    },
    async restore(config, template, signal) {
      requireSnapshot(template);
      const start = { options, host, config, portable: true, when: 'at the restore of its state' };
      const parts = await startFirecracker(start, (started) => loadSnapshot(started, config, template), signal);
      return new FirecrackerVm(parts);
    },
  };
}
