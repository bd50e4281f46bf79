import type { FileServers } from '../sandbox/volumes.ts';
import { VolumeServer } from '../volume/server.ts';
import { volumesProgram as program } from './installation.ts';

export const fileServers: FileServers = {
  start: ({ directory }) => VolumeServer.start({ program, directory }),
  adopt: (record, { directory }) => VolumeServer.adopt(record, { program, directory }),
};
