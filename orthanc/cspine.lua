-- Sends every CT Series to the C-Spine Node as soon as Orthanc calls it stable, and again while the node cannot be reached.
--
-- Only Instances of CT SOP Classes are sent, so neither the node's results (SEG, SR) nor a dose report among the
-- slices ever goes there, and nothing goes round in circles. Whether a Series can be analysed is the node's decision.

local NODE = 'cspine'  -- the node's name in "DicomModalities"

local CT_SOP_CLASSES = {
  ['1.2.840.10008.5.1.4.1.1.2'] = true,    -- CT Image Storage
  ['1.2.840.10008.5.1.4.1.1.2.1'] = true,  -- Enhanced CT Image Storage
  ['1.2.840.10008.5.1.4.1.1.2.2'] = true,  -- Legacy Converted Enhanced CT Image Storage
}
local LONGEST_WAIT_S, MAX_ATTEMPTS = 600, 150  -- which take a day
local NUM_CHANGES = 10000  -- that are looked through at the start
local SENT = '/metadata/4101'  -- of a Series: how many of its Instances the node has got; one says when our time began
local CANCELED = 37  -- Orthanc's code of a job that somebody ended

local hasBegun = false
local failed = {}  -- jobs: how often, when each is tried again, and what it sends

local function get(path)
  local answer = RestApiGet(path, true)
  return answer and ParseJson(answer)
end

local function ctInstances(series)
  local found = {}
  for _, instance in ipairs(series.Instances) do
    if CT_SOP_CLASSES[RestApiGet('/instances/' .. instance .. '/metadata/SopClassUid', true)] then
      table.insert(found, instance)
    end
  end
  return found
end

local function send(instances)
  -- A job in the background: it must not hold up Orthanc. One job is one association, so the node need not wait
  -- for its quiet time to know that it has the whole Series.
  RestApiPost('/modalities/' .. NODE .. '/store', DumpJson({Resources = instances, Synchronous = false}), true)
end

local function sendSeries(series, instances)
  if #instances > 0 then
    print('cspine: sending ' .. #instances .. ' Instances of Series ' .. series.MainDicomTags.SeriesInstanceUID)
    send(instances)
  end
end

local function ourJob(jobId)
  local job, node = get('/jobs/' .. jobId), get('/modalities/' .. NODE .. '/configuration')
  return job and node and job.Type == 'DicomModalityStore' and job.Content.RemoteAet == node.AET and job
end

local function tryAgain()
  for jobId, job in pairs(failed) do
    if job.at <= os.time() then
      job.at = math.huge
      if not RestApiPost('/jobs/' .. jobId .. '/resubmit', '{}', true) then  -- Orthanc keeps the last few only
        failed[jobId] = nil
        send(job.instances)
      end
    end
  end
end

-- What an Orthanc that ends never says or does: it forgets what is not stable yet, and may lose what it was about to do.
-- What was stable before this script was first run is left alone.
local function sendWhatCameBefore()
  local seriesOf, isStable, order = {}, {}, {}
  local since = math.max(0, get('/changes?last').Last - NUM_CHANGES)
  for _, change in ipairs(get(string.format('/changes?since=%d&limit=%d', since, NUM_CHANGES)).Changes) do
    if change.ChangeType == 'NewInstance' then
      local instance = not seriesOf[change.ID] and get('/instances/' .. change.ID)
      local series = instance and get('/series/' .. instance.ParentSeries)
      if series then
        table.insert(order, series)
        for _, id in ipairs(series.Instances) do
          seriesOf[id] = series.ID
        end
      end
      isStable[seriesOf[change.ID] or change.ID] = false
    elseif change.ChangeType == 'StableSeries' then
      isStable[change.ID] = true
    end
  end
  local isOurTime = false
  for _, series in ipairs(order) do
    local instances, sent = ctInstances(series), RestApiGet('/series/' .. series.ID .. SENT, true)
    isOurTime = isOurTime or sent ~= nil
    if sent ~= tostring(#instances) and (isOurTime or not isStable[series.ID]) then
      sendSeries(series, instances)
    end
  end
end

-- All scripts of an Orthanc share their functions: what another one does is kept, if it is listed before this one.
local function after(earlier, ours)
  return function(...)
    if earlier then
      earlier(...)
    end
    ours(...)
  end
end

Initialize = after(Initialize, sendWhatCameBefore)

OnStoredInstance = after(OnStoredInstance, function(instanceId)
  local instance = not hasBegun and get('/instances/' .. instanceId)
  if instance then
    hasBegun = true
    RestApiPut('/series/' .. instance.ParentSeries .. SENT, '0', true)
  end
end)

OnStableSeries = after(OnStableSeries, function(seriesId)
  local series = get('/series/' .. seriesId)
  if series then
    sendSeries(series, ctInstances(series))
  end
  tryAgain()
end)

OnJobSuccess = after(OnJobSuccess, function(jobId)
  failed[jobId] = nil
  local job = ourJob(jobId)
  local instance = job and get('/instances/' .. job.Content.ParentResources[1])
  if instance then
    RestApiPut('/series/' .. instance.ParentSeries .. SENT, string.format('%d', job.Content.InstancesCount), true)
  end
  tryAgain()
end)

OnJobFailure = after(OnJobFailure, function(jobId)
  local job = ourJob(jobId)
  if job and job.ErrorCode ~= CANCELED then
    local attempts = (failed[jobId] or {attempts = 0}).attempts + 1
    local wait = math.min(5 * 2 ^ (attempts - 1), LONGEST_WAIT_S)
    local known = {attempts = attempts, at = os.time() + wait, instances = job.Content.ParentResources}
    failed[jobId] = attempts < MAX_ATTEMPTS and known or nil
    local becomes = failed[jobId] and string.format('Tried again in %d s', wait) or 'When the node answers, resubmit it'
    print('cspine: NOT SENT: ' .. job.ErrorDescription .. ', job ' .. jobId .. '. ' .. becomes)
  end
end)

OnHeartBeat = after(OnHeartBeat, tryAgain)  -- an Orthanc before 1.11.1 has none, so a job waits for what else happens
